"""Laws of evaluation: one loop for both, ranks from true likelihoods, and runs that can go on."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import fakes
import families
import pytest
import reference
import torch
from torch import Tensor

from offramp import cli
from offramp.adapter.adapter import Adapter
from offramp.common.folders import locked_folder
from offramp.common.jsonl_log import JsonlLog
from offramp.core.decoding.policy import FULL, ExitPolicy
from offramp.core.decoding.scores import max_probability
from offramp.core.engine.generate import generate
from offramp.core.errors import DataError, InputError, StorageError
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet
from offramp.data.item import Item
from offramp.engines.packed import prepack
from offramp.evaluation import caption_metrics as captions
from offramp.evaluation import evaluate as module
from offramp.evaluation import results
from offramp.evaluation.evaluate import evaluate, rescore
from offramp.evaluation.loglikelihood import candidate_scores, follows_policy
from offramp.evaluation.run_log import RunLog
from offramp.evaluation.tasks import TASK_METRICS, EvaluationSettings
from offramp.features.input_processor import InputProcessor
from offramp.inputs.example import Example

DEPTHS = (2, 4)


@cache
def input_processor_of(name: str) -> InputProcessor:
    return InputProcessor(Backbone(families.build(name)), fakes.Blip2FakeProcessor(name))


@cache
def exits_of(name: str) -> Exits:
    """Exits that do not agree with the full model, as copies of its layers often do."""
    exits = Exits(input_processor_of(name).backbone, DEPTHS)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in exits.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))
    return exits.requires_grad_(False)


def adapter_of(name: str, threshold: float | None = 0.4, **policy: Any) -> Adapter:
    thresholds = {} if threshold is None else dict.fromkeys(DEPTHS, threshold)
    return Adapter(
        input_processor_of(name).backbone, exits_of(name), ExitPolicy(thresholds, **policy)
    )


OPT = "blip2-opt"
QUICK: dict[str, Any] = {"max_new_tokens": 6, "resamples": 50}


def items_of(n: int = 4) -> list[Item]:
    return [
        Item(example, groups={"half": "ab"[i % 2]}) for i, example in enumerate(fakes.examples(n))
    ]


def run(out: Path, *, model: Any = None, task: str = "gqa", items: Any = None, **more: Any) -> Any:
    return evaluate(
        adapter_of(OPT) if model is None else model,
        input_processor_of(OPT),
        items_of() if items is None else items,
        task,
        out=out,
        **{**QUICK, **more},
    )


def timeless(path: Path) -> list[dict[str, Any]]:
    """The answers in a folder without their times, in one order."""
    rows = [row for row in JsonlLog.read(path / "rows.jsonl") if "settings" not in row]
    kept = [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]
    return sorted(kept, key=lambda row: (row["key"], row["mode"]))


# -- likelihood ----------------------------------------------------------------------------------

CANDIDATES = ("w9 w12 w30", "w40", "w11 w9 w8 w77 w21", "w40 w41", "w90 w10")


def logits_of(
    name: str, example: Example, ids: list[int], exits: Exits | None
) -> dict[int, Tensor]:
    """By depth, the logits [A, V] that predict `ids`, from one uncached forward."""
    encoder = input_processor_of(name)
    prompts = encoder.prompts([example])
    answer = torch.tensor([ids])
    if encoder.backbone.is_encoder_decoder:
        start = int(encoder.backbone.text_config.decoder_start_token_id)
        sequence = torch.cat([torch.tensor([[start]]), answer], 1)
    else:
        sequence = torch.cat([prompts["input_ids"], answer], 1)
    found = reference.probe(encoder.backbone, prompts, sequence, exits).logits
    return {d: reference.of_steps(logits, len(ids))[0].float() for d, logits in found.items()}


def log_p(logits: Tensor, ids: list[int]) -> Tensor:
    return logits.log_softmax(-1)[range(len(ids)), ids]


@pytest.mark.parametrize("name", families.NAMES)
def test_a_candidates_score_is_its_likelihood_under_an_uncached_forward(name: str) -> None:
    encoder = input_processor_of(name)
    example = fakes.examples(3)[2]
    found = candidate_scores(encoder, example, CANDIDATES, at_once=2)
    for text, score in zip(CANDIDATES, found, strict=True):
        ids = encoder.answer_ids(example.prompt, text)
        logits = logits_of(name, example, ids, None)[encoder.backbone.depth]
        assert score == pytest.approx(float(log_p(logits, ids).sum()), abs=2e-3)


def splitting(confidences: torch.Tensor) -> float:
    """A threshold that no confidence [N, 2] is near, by which some tokens exit at each exit, and
    some at none."""
    ordered = confidences.flatten().sort().values
    for below in ordered.diff().argsort(descending=True):
        middle = float(ordered[below : below + 2].mean())
        early, late = (confidences >= middle).T
        if early.any() and (late & ~early).any() and not (early | late).all():
            return middle
    raise AssertionError("no threshold sends tokens to each depth")


@pytest.mark.parametrize("name", families.CAUSAL_PROMPT)
def test_under_a_policy_each_token_counts_where_it_would_leave(name: str) -> None:
    encoder, exits = input_processor_of(name), exits_of(name)
    example = fakes.examples(3)[2]
    ids = [encoder.answer_ids(example.prompt, text) for text in CANDIDATES]
    logits = [logits_of(name, example, some, exits) for some in ids]
    by_place = [torch.stack([max_probability(some[d]) for d in DEPTHS], 1) for some in logits]
    threshold = splitting(torch.cat(by_place))
    policy = ExitPolicy(dict.fromkeys(DEPTHS, threshold))
    found = candidate_scores(encoder, example, CANDIDATES, exits=exits, policy=policy)
    depths = set()
    for score, some, by_depth in zip(found, ids, logits, strict=True):
        total = 0.0
        for place in range(len(some)):
            sure = [d for d in DEPTHS if float(max_probability(by_depth[d][place])) >= threshold]
            depth = sure[0] if sure else encoder.backbone.depth
            total += float(log_p(by_depth[depth], some)[place])
            depths.add(depth)
        assert score == pytest.approx(total, abs=2e-3)
    assert depths == {*DEPTHS, encoder.backbone.depth}  # else the law would say little


def test_how_many_candidates_go_at_once_changes_nothing() -> None:
    example = fakes.examples(1)[0]
    one, all_ = (
        candidate_scores(input_processor_of(OPT), example, CANDIDATES, at_once=n) for n in (1, 100)
    )
    assert one == pytest.approx(all_, abs=1e-4)


def dialogue_items() -> list[Item]:
    return [
        replace(item, candidates=CANDIDATES, gold=i % 3, relevance=(1.0, 0.5, 0, 0, 0) * (i > 0))
        for i, item in enumerate(items_of(3))
    ]


@pytest.mark.parametrize(
    ("policy", "by"), [({}, "policy"), ({"lossless": True}, "full"), ({"shortlist": True}, "full")]
)
def test_candidates_are_ranked_by_the_policy_only_where_that_is_well_defined(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, policy: dict[str, Any], by: str
) -> None:
    model = adapter_of(OPT, 0.0, **policy)
    if "shortlist" in policy:  # which lacks tokens of the candidates
        model = replace(model, exits=replace(ExitSet.of(model.exits), shortlist=torch.arange(8)))
    result = run(tmp_path, model=model, task="dialogue", items=dialogue_items())
    assert follows_policy(model.policy) is (by == "policy")
    assert ("the full model ranks in both modes" in caplog.text) is bool(
        policy.keys() & {"shortlist"}
    )
    assert result["modes"]["full"]["ranked_by"] == ["full"]
    early = result["modes"]["early_exit"]
    assert early["ranked_by"] == [by]
    assert set(early["metrics"]) == set(TASK_METRICS["dialogue"])
    if by == "full":
        assert early["metrics"] == result["modes"]["full"]["metrics"]


def test_without_dense_annotations_ndcg_is_named_as_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    items = [replace(item, relevance=()) for item in dialogue_items()]
    result = run(tmp_path, task="dialogue", items=items, mode="full")
    assert result["modes"]["full"]["unavailable"] == {
        "ndcg": "the data came without dense annotations"
    }
    assert "ndcg is unavailable" in caplog.text


def test_a_round_without_a_relevant_candidate_is_left_out_of_ndcg(tmp_path: Path) -> None:
    """Of it, NDCG is not defined; the other measures count it."""
    zeros = [replace(item, relevance=item.relevance or (0.0,) * 5) for item in dialogue_items()]
    run(tmp_path, task="dialogue", items=dialogue_items(), mode="full")
    for metrics in (None, ("mrr",)):
        kept = rescore(tmp_path, dialogue_items(), "dialogue", mode="full", metrics=metrics)
        found = rescore(tmp_path, zeros, "dialogue", mode="full", metrics=metrics)
        assert found["modes"]["full"]["metrics"] == kept["modes"]["full"]["metrics"]


# -- the run -------------------------------------------------------------------------------------


def test_answers_are_what_generate_gives(tmp_path: Path) -> None:
    adapter, items = adapter_of(OPT, 0.4), items_of()
    run(tmp_path, model=adapter, items=items)
    rows = {(row["mode"], row["key"]): row for row in timeless(tmp_path)}
    for item in items:
        inputs = input_processor_of(OPT).prompts([item.example])
        for mode, policy in (("full", FULL), ("early_exit", adapter.policy)):
            found = adapter.generate(inputs, policy=policy, max_new_tokens=6, do_sample=False)
            row = rows[mode, item.key]
            assert row["ids"] == found.new_tokens[0].tolist()
            assert row["depths"] == found.depths[0].tolist()


def test_depths_add_up(tmp_path: Path) -> None:
    result = run(tmp_path, model=adapter_of(OPT, 0.0))
    full, early = result["modes"]["full"], result["modes"]["early_exit"]
    assert full["depth_shares"] == {"6": 1.0}
    assert full["mean_depth"] == 6
    assert set(early["depth_shares"]) == {"2"}
    assert sum(early["depth_shares"].values()) == pytest.approx(1)
    shares = early["depth_shares"].items()
    assert early["mean_depth"] == pytest.approx(sum(int(d) * share for d, share in shares))


def test_a_model_that_never_leaves_early_agrees_with_itself(tmp_path: Path) -> None:
    result = run(tmp_path, model=adapter_of(OPT, None))
    compared = result["compared"]
    assert compared["agreement"]["value"] == compared["agreement"]["low"] == 1
    for difference in compared["difference"].values():
        assert difference["value"] == difference["low"] == difference["high"] == 0
    assert compared["speedup"]["end_to_end"]["value"] > 0


@pytest.mark.parametrize(
    ("policy", "warned"),
    [({}, True), ({"lossless": True}, True), ({"drafts": {2: 0.4}, "lossless": True}, False)],
)
def test_a_policy_by_which_every_layer_runs_is_warned_of(
    policy: dict[str, Any], warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, model=adapter_of(OPT, None, **policy), items=items_of(1))
    assert ("no token exits early" in caplog.text) == warned


@pytest.mark.slow
def test_lossless_answers_are_the_full_models(tmp_path: Path) -> None:
    result = run(tmp_path, model=adapter_of(OPT, 0.0, lossless=True))
    assert result["compared"]["agreement"]["value"] == 1
    early = result["modes"]["early_exit"]
    assert 0 <= early["accepted"] <= early["drafted"] > 0
    with pytest.raises(InputError, match="other settings: policy"):
        run(tmp_path, model=adapter_of(OPT, 0.0), resume=True)


def test_drafts_that_share_the_prompts_call_count_as_decoding(tmp_path: Path) -> None:
    """An answer that lossless has whole with its first token took what it took beyond full
    depth's."""
    run(tmp_path, model=adapter_of(OPT, 0.0, lossless=True))
    rows = JsonlLog.read(tmp_path / "rows.jsonl")
    took = {"full": (9.0, 6.0), "early_exit": (5.0, 0.0)}
    done = {
        (row["mode"], row["key"]): {
            **row,
            "seconds": took[row["mode"]][0],
            "decode_seconds": took[row["mode"]][1],
        }
        for row in rows
        if "settings" not in row
    }
    stored = next(row["settings"] for row in rows if "settings" in row)
    result = results.score(done, items_of(), EvaluationSettings("gqa", **QUICK), stored)
    assert result["compared"]["speedup"]["decode"]["value"] == 3.0  # 6 over 5 - 3
    assert result["compared"]["speedup"]["end_to_end"]["value"] == 9 / 5


def test_latency_has_a_median_and_a_tail(tmp_path: Path) -> None:
    for mode in run(tmp_path)["modes"].values():
        for times in (mode["latency"]["seconds"], mode["latency"]["decode_seconds"]):
            assert 0 < times["p50"] <= times["p95"]
        assert mode["latency"]["decode_seconds"]["p50"] < mode["latency"]["seconds"]["p50"]


def test_batches_give_the_same_answers_and_no_latency(tmp_path: Path) -> None:
    run(tmp_path / "one", model=adapter_of(OPT, None))
    result = run(tmp_path / "three", model=adapter_of(OPT, None), batch_size=3)
    assert timeless(tmp_path / "one") == timeless(tmp_path / "three")
    assert result["modes"]["full"]["latency"] is None
    assert result["compared"]["speedup"] == {"end_to_end": None, "decode": None}


def test_a_right_answer_counts_and_groups_are_told_apart(tmp_path: Path) -> None:
    backbone, encoder = input_processor_of(OPT).backbone, input_processor_of(OPT)
    items = items_of()
    right = generate(
        backbone, encoder.prompts([items[0].example]), max_new_tokens=6, do_sample=False
    )
    items[0] = replace(items[0], references=(encoder.texts(right.new_tokens)[0],))
    result = run(tmp_path, model=backbone, items=items, mode="full")
    found = result["modes"]["full"]
    assert found["metrics"]["exact_match"]["value"] == 0.25
    assert found["by_group"]["half"]["a"]["exact_match"]["value"] == 0.5
    assert found["by_group"]["half"]["b"]["exact_match"]["value"] == 0
    assert found["by_group"]["half"]["a"]["n"] == 2
    assert "compared" not in result


def test_the_result_on_disk_is_the_one_returned(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(result))
    assert result["provenance"]["seed"] == 0


def test_captions_name_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "_java", lambda: None)
    result = run(tmp_path, task="captions", mode="full")
    found = result["modes"]["full"]
    assert set(found["unavailable"]) == {"METEOR", "SPICE"}
    assert found["tokenizer"] == "simple"
    assert "not comparable" in found["tokenizer_note"]
    assert found["metrics"]["CIDEr"]["low"] is not None


# -- going on, and scoring again ---------------------------------------------------------------


class Interrupted(Exception):
    pass


def after(batches: int) -> Any:
    """A progress bar during which somebody presses Ctrl-C."""

    def progress(things: Sequence[Any]) -> Iterator[Any]:
        yield from things[:batches]
        raise Interrupted

    return progress


def test_an_interrupted_run_goes_on_to_the_same_answers(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", progress=after(2))
    assert len(timeless(tmp_path / "cut")) == 4
    with open(tmp_path / "cut" / "rows.jsonl", "a") as file:
        file.write('{"key": "e3", "mo')  # the power went
    seen: list[Any] = []
    run(tmp_path / "cut", resume=True, progress=lambda things: seen.extend(things) or things)
    assert len(seen) == 2
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole")


def test_another_mode_can_be_added_to_a_run(tmp_path: Path) -> None:
    run(tmp_path, mode="full")
    before = timeless(tmp_path)
    result = run(tmp_path, resume=True)
    assert [row for row in timeless(tmp_path) if row["mode"] == "full"] == before
    assert set(result["modes"]) == {"full", "early_exit"}


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(InputError, match=r"already holds answers.*\n.*--resume"):
        run(tmp_path)


def test_a_folder_that_another_run_writes_to_is_refused(tmp_path: Path) -> None:
    with locked_folder(tmp_path), pytest.raises(StorageError, match="Another run is writing"):
        run(tmp_path)
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"max_new_tokens": 5}, "max_new_tokens was 6, now 5"),
        ({"batch_size": 2}, "batch_size was 1, now 2"),
        ({"model": adapter_of(OPT, 0.7)}, "policy"),
    ],
)
def test_a_run_with_other_settings_is_not_gone_on_with(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    run(tmp_path)
    with pytest.raises(InputError, match="other settings") as error:
        run(tmp_path, resume=True, **change)
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("kernels", "compiled"), ("shrink_on_load", True), ("runtime", "x"), ("vision", "openvino")],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_run_with_another_engine_is_not_gone_on_with(
    tmp_path: Path, name: str, value: Any, first: bool
) -> None:
    """The default has no entry where the other has one, whichever of the two was first."""
    plain: dict[str, Any] = {"task": "gqa"}
    other = {**plain, name: value}
    before, now = (other, plain) if first else (plain, other)
    RunLog(tmp_path / "rows.jsonl", before, [], resume=False).close()
    with pytest.raises(InputError, match=f"other settings: {name} .*{value}"):
        RunLog(tmp_path / "rows.jsonl", now, [], resume=True)


def test_other_kernels_are_noticed_and_a_run_that_names_none_had_plain_ones(tmp_path: Path) -> None:
    run(tmp_path)
    file = tmp_path / "rows.jsonl"
    first, *rest = file.read_text().splitlines()
    settings = json.loads(first)
    del settings["settings"]["kernels"]
    file.write_text("\n".join([json.dumps(settings), *rest]) + "\n")
    run(tmp_path, resume=True)
    packed = Adapter(Backbone(families.build(OPT)), exits_of(OPT), adapter_of(OPT).policy)
    prepack(packed.backbone, every=True)
    with pytest.raises(InputError, match=r"other settings: kernels \(.* plain, now prepacked"):
        run(tmp_path, model=packed, resume=True)


def test_other_exits_are_noticed(tmp_path: Path) -> None:
    run(tmp_path)
    other = Adapter(
        input_processor_of(OPT).backbone,
        Exits(input_processor_of(OPT).backbone, DEPTHS),
        adapter_of(OPT).policy,
    )
    with pytest.raises(InputError, match="other settings: exits"):
        run(tmp_path, model=other, resume=True)


def test_a_changed_example_is_noticed(tmp_path: Path) -> None:
    items = items_of()
    run(tmp_path, items=items)
    items[1] = replace(items[1], example=replace(items[1].example, prompt="w50"))
    with pytest.raises(DataError, match="'e1' asks something else"):
        run(tmp_path, items=items, resume=True)
    with pytest.raises(DataError, match="'e1' asks something else"):
        rescore(tmp_path, items, "gqa")


def test_scoring_again_needs_no_model_and_takes_other_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(tmp_path)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model ran")

    monkeypatch.setattr(module, "generate", refuse)
    again = rescore(tmp_path, items_of(), "gqa", resamples=50)
    for key in ("modes", "compared", "n"):
        assert again[key] == first[key]
    answers = {row["key"]: row["answer"] for row in timeless(tmp_path) if row["mode"] == "full"}
    right = [replace(item, references=(answers[item.key],)) for item in items_of()]
    found = rescore(tmp_path, right, "gqa", mode="full", metrics=("exact_match",))
    assert found["modes"]["full"]["metrics"]["exact_match"]["value"] == 1
    assert set(found["modes"]["full"]["metrics"]) == {"exact_match"}


def test_scoring_a_part_says_how_many_are_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Interrupted):
        run(tmp_path, progress=after(3))
    result = rescore(tmp_path, items_of(), "gqa", resamples=50)
    assert (result["n"], result["missing"]) == (3, 1)
    assert "1 of 4 examples have no answer" in caplog.text


def test_scoring_what_is_not_there_is_refused(tmp_path: Path) -> None:
    run(tmp_path, mode="full")
    with pytest.raises(InputError, match="task 'gqa', not 'captions'"):
        rescore(tmp_path, items_of(), "captions")
    with pytest.raises(DataError, match="no answers of mode early_exit"):
        rescore(tmp_path, items_of(), "gqa", mode="early_exit")
    (tmp_path / "rows.jsonl").write_text('{"key": "a"}\n')
    with pytest.raises(DataError, match="not written by this version"):
        rescore(tmp_path, items_of(), "gqa")


# -- bad input -----------------------------------------------------------------------------------


def test_examples_that_cannot_be_evaluated_are_named(tmp_path: Path) -> None:
    item = items_of(1)[0]
    unlabelled = Item(replace(item.example, answers=()))
    for items, task, words in (
        ([], "gqa", "no examples"),
        ([item, item], "gqa", "'e0'"),
        ([unlabelled], "gqa", "'e0' has no reference"),
        ([item], "dialogue", "'e0' has no candidates"),
        ([item], "vqa", "ten people"),
    ):
        with pytest.raises(DataError, match=words):
            run(tmp_path / task, items=items, task=task)
        assert not (tmp_path / task / "rows.jsonl").exists()  # before anything is generated


def test_a_missing_package_is_noticed_before_anything_is_generated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(InputError, match=r"\[eval\]"):
        run(tmp_path / "run", task="captions")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"task": "caption"}, "'captions'"),
        ({"task": "gqa", "mode": "early"}, "'early_exit'"),
        ({"task": "gqa", "metrics": ("CIDEr",)}, "'CIDEr' is not known"),
        ({"task": "gqa", "batch_size": 0}, "batch_size is 0"),
        ({"task": "gqa", "max_new_tokens": 0}, "longest is 0"),
        ({"task": "gqa", "confidence": 1.0}, "confidence is 1.0"),
    ],
)
def test_settings_that_cannot_be_used_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as error:
        EvaluationSettings(**settings)
    assert words in str(error.value)


def test_a_backbone_has_no_exits_to_evaluate(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Mode both needs exits"):
        run(tmp_path, model=input_processor_of(OPT).backbone)


# -- the command ---------------------------------------------------------------------------------


def test_the_command_evaluates_goes_on_and_scores_again(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", "--task", "gqa", "--data", str(questions), "--out", str(tmp_path / "run")]
    arguments.append("--json")
    results = []
    for more in (["--backbone", "tiny-opt"], ["--backbone", "tiny-opt", "--resume"], ["--rescore"]):
        assert cli.main([*arguments, *more]) == 0
        results.append(json.loads(capsys.readouterr().out))
    for result in results:
        assert result["n"] == 2
        assert result["modes"] == results[0]["modes"]
        assert set(result["modes"]["full"]["metrics"]) == {"exact_match", "exact_match_normalised"}
