"""Laws of shapes and of forced exits: what is asked for runs, and is predicted as it ran."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import parser_of
from made_up_costs import COSTS

from offramp.calibration.cost_model import Costs, token_seconds
from offramp.engine.decoding.scheduler import Schedule
from offramp.engine.executors.slots import memory
from offramp.engine.generate import generate
from offramp.errors import InputError
from offramp.evaluation.scripted_exits import OPTIONS
from offramp.models.backbone import Backbone
from offramp.models.quantized import prepacked
from offramp_lab.commands.bench import _subject
from offramp_lab.experiments.benchmark.bench import (
    batch_costs,
    bench,
    best_draft,
    shortlisted,
    spread,
    table,
    untrained,
)
from offramp_lab.experiments.benchmark.cases import Case
from offramp_lab.experiments.benchmark.simulator import decoding_seconds
from offramp_lab.inputs import drawn_weights
from offramp_lab.inputs.shapes import SHAPES, shape

MINIS = ("mini-opt", "mini-t5", "mini-llava")


# -- shapes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layers", "width", "vocabulary", "gigabytes"),
    [
        ("opt-2.7b", 32, 2560, 50304, 5.5),
        ("flan-t5-xl", 24, 2048, 32128, 3.5),
        ("llava-7b", 32, 4096, 32064, 13.9),
        ("smollm2-135m", 30, 576, 49152, 0.28),
    ],
)
def test_a_shape_is_as_large_as_its_name_says(
    name: str, layers: int, width: int, vocabulary: int, gigabytes: float
) -> None:
    backbone = Backbone(shape(name).empty())
    assert (backbone.depth, backbone.width, backbone.vocabulary) == (layers, width, vocabulary)
    assert shape(name).bytes(torch.bfloat16) == pytest.approx(gigabytes * 1e9, rel=0.03)


@pytest.mark.parametrize("name", MINIS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_built_shape_has_the_bytes_that_were_announced(name: str, dtype: torch.dtype) -> None:
    backbone = shape(name).build(dtype)
    built = sum(p.numel() * p.element_size() for p in backbone.model.parameters())
    exit = sum(p.numel() * p.element_size() for p in backbone.layers[0].parameters())
    assert backbone.dtype == dtype
    assert built + exit == shape(name).bytes(dtype)


@pytest.mark.parametrize("name", MINIS)
def test_a_shape_decodes_as_any_backbone(name: str) -> None:
    backbone = shape(name).build()
    inputs = shape(name).inputs(backbone, 2)
    stock = backbone.model.generate(**inputs, max_new_tokens=5, **OPTIONS)
    ours = generate(backbone, inputs, max_new_tokens=5, **OPTIONS)
    assert ours.new_tokens.shape == (2, 5)
    assert torch.equal(ours.new_tokens, stock[:, -5:])


def test_the_same_seed_gives_the_same_weights() -> None:
    first, again, other = (shape("mini-opt").build(seed=s).head.weight for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_shape_that_does_not_fit_is_refused_before_it_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 2_000_000_000)
    monkeypatch.setattr(drawn_weights, "fill", lambda *_: pytest.fail("it was built"))
    with pytest.raises(InputError, match=r"5\.5 GB in bfloat16, and 2\.0 GB") as caught:
        shape("opt-2.7b").build(torch.bfloat16)
    assert "smaller shape" in caught.value.remedy


def test_an_unknown_shape_names_the_known_ones() -> None:
    with pytest.raises(InputError) as caught:
        shape("opt-2.7")
    assert "'opt-2.7b'" in caught.value.remedy
    assert all(name in caught.value.remedy for name in SHAPES)


# -- forced exits -------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.5, 0.75, 0.9, 1.0])
def test_exits_are_spread_evenly_and_as_many_as_asked(rate: float) -> None:
    leaves = spread(40, rate)
    assert int(leaves.sum()) == round(40 * rate)
    stays = (~leaves).nonzero().flatten()
    assert len(stays) < 2 or int(stays.diff().max() - stays.diff().min()) <= 1


@pytest.fixture(scope="module")
def entries() -> list[dict[str, Any]]:
    backbone = shape("mini-llava").build()
    cases = [
        Case(2, 0.0),
        Case(2, 0.75),
        Case(4, 0.75, "propagate"),
        Case(2, 0.8, "lossless"),
    ]
    inputs = shape("mini-llava").inputs(backbone)
    return bench(backbone, inputs, cases, COSTS, untrained(backbone, (2, 4)), tokens=20, rounds=1)


def test_every_case_has_an_entry_with_what_the_record_needs(entries: list[dict[str, Any]]) -> None:
    needed = {
        "name", "shape", "dtype", "batch", "exit_depth", "exit_rate", "policy", "predicted",
        "measured", "repeats", "machine", "versions",
    }  # fmt: skip
    assert [e["policy"] for e in entries] == [
        "full", "recompute", "recompute", "propagate", "lossless",
    ]  # fmt: skip
    for each in entries:
        assert needed <= set(each)
        assert each["measured"] > 0
    json.dumps(entries, allow_nan=False)


def test_predictions_are_those_of_the_plan_that_ran(entries: list[dict[str, Any]]) -> None:
    _, check, recompute, _, lossless = (e["predicted"] for e in entries)
    assert check == pytest.approx(COSTS.full / (COSTS.full + 3.8))
    each = 0.5 + 2 + 3.5 + 0.25 * (0.3 + 6 * 1.2 + 2)
    assert recompute == pytest.approx(COSTS.full / each)
    assert lossless > 0


def test_drafts_are_right_as_often_as_asked(entries: list[dict[str, Any]]) -> None:
    """Four of twenty drafted tokens are wrong: each of them ends a round."""
    lossless = entries[-1]
    assert lossless["max_draft"] == best_draft(COSTS, 2, 0.8)
    assert 0 < lossless["accepted"] < lossless["drafted"]


def test_a_check_that_never_fires_is_also_given_in_layers(entries: list[dict[str, Any]]) -> None:
    check = entries[1]
    assert check["check_layers"] == pytest.approx((1 / check["measured"] - 1) * COSTS.full)
    assert "check_layers" not in entries[2]


@pytest.mark.parametrize("independent", [False, True])
def test_rows_of_a_batch_leave_together_or_each_on_its_own(independent: bool) -> None:
    backbone = shape("mini-t5").build()
    inputs = shape("mini-t5").inputs(backbone, 3)
    given = backbone, inputs, [Case(2, 0.5)], COSTS, untrained(backbone, (2,))
    found = bench(*given, tokens=12, rounds=1, independent=independent)
    together = bench(*given, tokens=12, rounds=1)
    assert found[1]["batch"] == 3
    if independent:  # all three leave in one step of eight: hardly any is shallow
        assert found[1]["predicted"] < together[1]["predicted"]
    else:
        assert found[1]["predicted"] == together[1]["predicted"]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Case(2, 1.5),
        lambda: Case(2, 0.5, "recomput"),
    ],
)
def test_impossible_cases_are_refused(wrong: Any) -> None:
    with pytest.raises(InputError):
        wrong()


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_a_batch_that_exits_together_is_predicted_as_one_row(rate: float) -> None:
    rows, tokens = 4, 24
    leave, costs = spread(tokens, rate), replace(COSTS, batch=rows)
    took = decoding_seconds(
        batch_costs(costs, 2),
        lambda _, _row, place: bool(leave[place - 1]),
        [1 + tokens] * rows,
        Schedule.of(rows),
    )
    depths = np.where(leave.numpy(), 2, COSTS.layers)
    assert took == pytest.approx(float(token_seconds(COSTS, depths, [2])))


@pytest.mark.parametrize("size", [1, 513])
def test_a_shortlist_that_the_vocabulary_does_not_have_is_refused(size: int) -> None:
    backbone = shape("mini-opt").build()
    with pytest.raises(InputError, match="from 2 to 512"):
        shortlisted(backbone, untrained(backbone, (2,)), size)


def test_the_table_shows_every_case(entries: list[dict[str, Any]]) -> None:
    shown = table(COSTS, entries)
    assert all(e["name"] in shown for e in entries)


# -- the command --------------------------------------------------------------------------------


def run(*arguments: Any) -> None:
    parsed = parser_of("bench").parse_args(["bench", *map(str, arguments)])
    parsed.run(parsed)


def test_the_command_prints_a_table_and_writes_a_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    run(
        "--shape", "mini-opt", "--dtype", "float32", "--depths", 2, "--rates", 0.5,
        "--tokens", 8, "--rounds", 1, "--out", out,
    )  # fmt: skip
    record = json.loads(out.read_text())
    policies = [e["policy"] for e in record["entries"]]
    assert policies == ["full", "recompute", "propagate", "lossless"]
    assert Costs.from_json(record["costs"]).layers == 8
    shown = capsys.readouterr().out
    assert all(e["name"] in shown for e in record["entries"])


def test_a_shapes_weights_are_laid_out_where_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepacked, "LEAST", 0)
    for asked in ((), ("--engine", "packed")):
        words = ["bench", "--shape", "mini-opt", "--dtype", "float32", *asked]
        backbone, _, _ = _subject(parser_of("bench").parse_args(words))
        kinds = {type(part) for part in backbone.layers.modules()}
        assert (prepacked.PrepackedLinear in kinds) is bool(asked)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((), "--shape"),
        (("--shape", "mini-opt", "--adapter", "x"), "--shape"),
        (("--shape", "mini-opt", "--batch", "0"), "batch"),
        (("--shape", "mini-opt", "--threads", "0"), "threads"),
        (("--shape", "mini-opt", "--depths", "8"), "8 decoder layers"),
        (("--shape", "mini-opt", "--policy", "lossles"), "lossless"),
        (("--shape", "mini-opt", "--peers"), "--adapter"),
    ],
)
def test_mistakes_on_the_command_line_are_explained(arguments: tuple[str, ...], word: str) -> None:
    with pytest.raises(InputError, match=word):
        run(*arguments)
