"""A sweep tells, from one pass, what decoding at each threshold would do."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes
import pytest
from command_line import RunCommand, assert_two_lines

from offramp.adapter.adapter import Adapter
from offramp.adapter.answers import generate_answers
from offramp.calibration.cost_model import Costs
from offramp.calibration.risk_functions import QUALITIES
from offramp.calibration.sweep import sweep
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.errors import InputError
from offramp.features.input_processor import InputProcessor

TOKENS = 8
Build = Callable[..., Any]


def adapter_of(backbone: Build, exits: Build, name: str) -> Adapter:
    return Adapter(backbone(name, wide=4.0), exits(name, wide=4.0))


def costs_of(layers: int) -> Costs:
    """A layer takes a second, and nothing else takes any."""
    free = {"exit": 0.0, "check": 0.0, "score": 0.0, "token": 0.0, "reenter": 0.0}
    return Costs(layers=layers, batch=1, context=8, layer=(1, 1, 1, 1), head=(0, 0, 0, 0), **free)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5"])
def test_a_share_of_changed_answers_is_that_of_decoding(
    backbone: Build, exits: Build, name: str
) -> None:
    adapter = adapter_of(backbone, exits, name)
    encoder = InputProcessor(adapter.backbone, fakes.Blip2FakeProcessor(name))
    examples = fakes.examples(6)
    found = sweep(
        adapter,
        encoder,
        examples,
        ("max_probability", "entropy"),
        thresholds=(1.0, 0.3, 0.0),
        costs=costs_of(adapter.backbone.depth),
        max_new_tokens=TOKENS,
    )
    assert [(row.score, row.threshold) for row in found] == [
        (score, t) for score in ("max_probability", "entropy") for t in (1.0, 0.3, 0.0)
    ]
    for row in found:
        policy = ExitPolicy(dict.fromkeys(adapter.exits.depths, row.threshold), score=row.score)
        changed = 0
        for example in examples:
            inputs = encoder.prompts([example])
            early, full = (
                adapter.generate(inputs, policy=by, max_new_tokens=TOKENS, do_sample=False)
                for by in (policy, ExitPolicy())
            )
            changed += early.new_tokens.tolist() != full.new_tokens.tolist()
        assert row.changed == changed / len(examples)
    for score in ("max_probability", "entropy"):
        depths = [row.depth for row in found if row.score == score]
        assert depths == sorted(depths, reverse=True) and depths[-1] == min(adapter.exits.depths)
    assert found[2].speed > found[0].speed >= 1.0


def test_the_cider_of_examples_with_references_is_that_of_decoding(
    backbone: Build, exits: Build
) -> None:
    pytest.importorskip("pycocoevalcap")
    adapter = adapter_of(backbone, exits, "blip2-opt")
    encoder = InputProcessor(adapter.backbone, fakes.Blip2FakeProcessor("blip2-opt"))
    bare = fakes.examples(6)
    full = generate_answers(adapter, encoder, bare, ExitPolicy(), max_new_tokens=TOKENS)
    examples = [replace(e, answers=(a.text,)) for e, a in zip(bare, full, strict=True)]
    options = {"thresholds": (1.0, 0.3, 0.0), "costs": costs_of(adapter.backbone.depth)}
    found = sweep(adapter, encoder, examples, max_new_tokens=TOKENS, **options)
    for row in found:
        policy = ExitPolicy(dict.fromkeys(adapter.exits.depths, row.threshold))
        made = generate_answers(adapter, encoder, examples, policy, max_new_tokens=TOKENS)
        assert row.cider == pytest.approx(float(QUALITIES["cider"](made, examples).mean()))
    assert len({row.cider for row in found}) > 1
    bare = [replace(example, answers=()) for example in examples]
    without = sweep(adapter, encoder, bare, max_new_tokens=TOKENS, **options)
    assert [row.cider for row in without] == [None] * 3


def test_a_score_that_a_pass_does_not_show_is_refused(backbone: Build, exits: Build) -> None:
    adapter = adapter_of(backbone, exits, "blip2-opt")
    encoder = InputProcessor(adapter.backbone, fakes.Blip2FakeProcessor("blip2-opt"))
    with pytest.raises(InputError, match="patience"):
        sweep(adapter, encoder, fakes.examples(2), ("patience",))


@pytest.mark.slow
def test_the_command_writes_a_table_and_a_plot(
    run: RunCommand, adapter: Path, held_out: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sweep.csv"
    asked = ("sweep", adapter, "--data", held_out, "--limit", 2, "--max-new-tokens", 3)
    code, text, err = run(*asked, "--score", "margin", "entropy", "--out", out)
    assert code == 0 and "margin" in text, err
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert {row["score"] for row in rows} == {"margin", "entropy"}
    assert all(0 <= float(row["changed"]) <= 1 for row in rows)
    assert out.with_suffix(".svg").read_text().startswith("<svg")
    assert run(*asked, "--out", out)[0] == 0
    out.write_text("mine")
    assert_two_lines(run(*asked, "--out", out), "it would be lost")
    assert out.read_text() == "mine"
