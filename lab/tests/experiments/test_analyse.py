"""Laws of the analysis: it counts what slow loops count, and never calls noise a dip."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
import torch

from offramp.adapter import Adapter
from offramp.answers import full_model_answers
from offramp.calibration.replay import Replay
from offramp.data.decontamination import picture_digests
from offramp.data.example import Example
from offramp.engine.generate import generate
from offramp.engine.policy import ExitPolicy
from offramp.errors import DataError, InputError
from offramp.models.exits import ExitSet
from offramp.models.input_processor import InputProcessor
from offramp.report import plots
from offramp_lab import cli
from offramp_lab.experiments.analysis import analyse as module
from offramp_lab.experiments.analysis.analyse import analyse
from offramp_lab.experiments.analysis.config import AnalysisConfig
from offramp_lab.experiments.analysis.depth_curves import (
    Bootstrap,
    by_policy,
    curve,
    dip,
    overthinking,
    overthought,
)
from offramp_lab.experiments.analysis.needed_depth import (
    first_agreement,
    positions,
    settled,
    word_class,
)
from offramp_lab.experiments.analysis.summary import summary

Build = Callable[..., Any]
QUICK = {"resamples": 50, "max_new_tokens": 6}


def drawn(answers: int = 12, layers: int = 4, seed: int = 0) -> Replay:
    """A replay of random tokens of three kinds, so that all that can happen does."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 6, answers)
    mask = np.arange(5) < lengths[:, None]

    def tokens() -> Any:
        return np.where(mask, draw.integers(0, 3, mask.shape), -1)

    said = {depth: tokens() for depth in range(1, layers)}
    scores = {d: np.where(mask, draw.random(mask.shape), np.nan) for d in said}
    return Replay(layers, tokens(), tokens(), said, scores)


def each(found: Replay) -> list[tuple[int, int]]:
    return [(n, a) for n, a in zip(*np.nonzero(found.mask), strict=True)]


def pictures(found: Replay) -> Bootstrap:
    return Bootstrap([f"p{n // 2}" for n in range(len(found.targets))], resamples=200)


# -- counting ------------------------------------------------------------------------------------


def test_sets_of_tokens_are_those_of_a_slow_loop() -> None:
    found = drawn()
    counts = {"overthought": 0, "at_risk": 0, "only_final": 0}
    oracle = 0
    for n, a in each(found):
        early = [said[n, a] == found.targets[n, a] for said in found.said.values()]
        final = found.final[n, a] == found.targets[n, a]
        counts["overthought"] += any(early) and not final
        counts["at_risk"] += final and not all(early)
        counts["only_final"] += final and not any(early)
        oracle += final or any(early)
    told = overthinking(found, pictures(found))
    assert all(counts.values())
    assert {name: told[name]["n"] for name in counts} == counts
    assert told["oracle"]["value"] == pytest.approx(oracle / told["tokens"])
    assert told["overthought"]["share"]["value"] == pytest.approx(
        counts["overthought"] / told["tokens"]
    )


def test_what_a_depth_mends_and_spoils_is_its_difference_to_the_final_layer() -> None:
    found = drawn()
    told = overthinking(found, pictures(found))
    right = (found.final == found.targets)[found.mask].sum()
    for row in told["by_depth"]:
        here = (found.said[row["depth"]] == found.targets)[found.mask].sum()
        assert row["mended"] - row["spoiled"] == here - right


def test_the_final_layer_has_no_overthought_token_right_and_an_oracle_has_all() -> None:
    found = drawn()
    best = np.zeros(found.targets.shape, int)
    for n, a in each(found):
        right = [d for d, said in found.said.items() if said[n, a] == found.targets[n, a]]
        best[n, a] = right[0] if right else found.layers
    told = by_policy(found, best, pictures(found), overthought(found))
    assert told["n_overthought"] > 0
    assert told["on_overthought"]["value"] == 1.0
    assert told["final_on_overthought"]["value"] == 0.0
    whole = np.where(found.mask, found.layers, 0)
    full = by_policy(found, whole, pictures(found), overthought(found))
    assert full["difference"]["value"] == 0.0
    assert full["mean_depth"] == found.layers


def test_needed_depths_are_those_of_a_slow_loop() -> None:
    found = drawn(40)
    stay, meet = settled(found), first_agreement(found)
    for n, a in each(found):
        same = [said[n, a] == found.final[n, a] for said in found.said.values()] + [True]
        first = next(i for i, yes in enumerate(same) if yes) + 1
        last = max((i for i, yes in enumerate(same) if not yes), default=-1) + 2
        assert (meet[n, a], stay[n, a]) == (first, last)
    assert not stay[~found.mask].any()
    assert not meet[~found.mask].any()
    assert set(stay[found.mask]) == {1, 2, 3, 4}


def test_a_token_has_one_position() -> None:
    told = positions(np.array([[5, 6, 2], [2, -1, -1], [5, 2, -1]]), end=2)
    assert told.tolist() == [["first", "middle", "end"], ["end", "", ""], ["first", "end", ""]]


# -- dips ----------------------------------------------------------------------------------------


def flat(rise: list[float], pictures: int = 200, seed: int = 0) -> tuple[Any, Bootstrap]:
    """Right answers of `pictures` images by depth, with the expected values `rise`."""
    hits = np.random.default_rng(seed).random((pictures, len(rise))) < np.array(rise)
    return hits.astype(float), Bootstrap([str(i) for i in range(pictures)])


def test_a_dip_is_found_where_it_is() -> None:
    hits, draws = flat([0.3, 0.8, 0.4, 0.9])
    told = dip([2, 4, 6, 8], hits, np.ones(len(hits)), draws)
    assert told["found"]
    assert (told["from_depth"], told["to_depth"]) == (4, 6)
    assert told["fall"] == pytest.approx(hits[:, 1].mean() - hits[:, 2].mean())
    assert told["low"] < 0.4 < told["high"]


def test_a_curve_that_never_falls_has_no_dip() -> None:
    hits = np.tile([0.0, 0.0, 1.0], (5, 1))
    told = dip([1, 2, 3], hits, np.ones(5), Bootstrap([str(i) for i in range(5)]))
    assert told == {
        "fall": 0.0, "low": None, "high": None, "from_depth": None, "to_depth": None,
        "found": False,
    }  # fmt: skip


def test_noise_is_called_a_dip_at_most_as_often_as_stated() -> None:
    """Twelve equal depths have 66 pairs: an interval of the largest fall alone would often fail."""
    wrong = 0
    for seed in range(60):
        hits, draws = flat([0.5] * 12, seed=seed)
        draws = Bootstrap(draws.groups, resamples=200)
        wrong += dip(range(1, 13), hits, np.ones(len(hits)), draws)["found"]
    assert wrong <= 7  # 5% of 60 is 3; more than 7 has a probability below 1%


def test_one_picture_tells_a_fall_but_not_whether_it_is_real() -> None:
    told = dip([1, 2], np.array([[1.0, 0.0]]), np.ones(1), Bootstrap(["p"]))
    assert told["fall"] == 1.0
    assert told["low"] is None
    assert not told["found"]


def test_a_curve_ends_with_the_final_layer() -> None:
    found = drawn()
    told = curve(found, found.targets, pictures(found))
    assert told["depths"] == [1, 2, 3, 4]
    final = (found.final == found.targets)[found.mask].mean()
    assert told["values"][-1]["value"] == pytest.approx(final)
    assert all(v["low"] <= v["value"] <= v["high"] for v in told["values"])


def test_agreement_of_the_final_layer_with_itself_is_one() -> None:
    found = drawn()
    assert curve(found, found.final, pictures(found))["values"][-1]["value"] == 1.0


# -- the whole -----------------------------------------------------------------------------------


def model(backbone: Build, exits: Build, name: str) -> tuple[Adapter, InputProcessor]:
    wide = backbone(name, wide=4.0)
    trained = exits(name, wide=4.0)
    policy = ExitPolicy({d: 0.3 for d in trained.depths})
    return Adapter(wide, trained, policy), InputProcessor(wide, fakes.Blip2FakeProcessor(name))


@pytest.fixture(scope="module", params=["blip2-opt", "blip2-t5", "llava"])
def analysed(
    request: pytest.FixtureRequest,
    backbone: Build,
    exits: Build,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Any, Any, Any, Path]:
    adapter, encoder = model(backbone, exits, request.param)
    out = tmp_path_factory.mktemp("analysis")
    told = analyse(adapter, encoder, fakes.examples(6), AnalysisConfig(**QUICK), out=out)  # type: ignore[arg-type]
    return adapter, encoder, told, out


def test_it_is_what_is_written(analysed: Any) -> None:
    *_, told, out = analysed
    assert json.loads((out / "analysis.json").read_text()) == json.loads(json.dumps(told))
    for name in ("agreement", "accuracy", "identical", "quality", "needed-lens", "needed-exits"):
        assert (out / f"{name}.svg").read_text().startswith("<svg")


def test_the_lens_looks_at_every_depth_and_exits_at_theirs(analysed: Any) -> None:
    adapter, _, told, _ = analysed
    layers = told["layers"]
    for part in ("teacher_forced", "free_running"):
        for some in told[part]["lens"].values():
            assert some["depths"] == list(range(1, layers + 1))
        for some in told[part]["exits"].values():
            assert some["depths"] == [*adapter.exits.depths, layers]


def test_free_running_is_what_generation_at_that_depth_writes(analysed: Any) -> None:
    adapter, encoder, told, _ = analysed
    found = told["free_running"]["exits"]["identical"]
    for depth, value in zip(found["depths"], found["values"], strict=True):
        thresholds = {depth: 0.0} if depth in adapter.exits.depths else {}
        same = []
        for example in fakes.examples(6):
            ids = []
            for policy in (ExitPolicy(thresholds), ExitPolicy()):
                result = generate(
                    adapter.backbone, encoder.prompts([example]), exits=adapter.exits,
                    policy=policy, max_new_tokens=6, do_sample=False,
                )  # fmt: skip
                ids.append(result.new_tokens[0].tolist())
            same.append(ids[0] == ids[1])
        assert value["value"] == pytest.approx(np.mean(same))


def test_the_policy_is_judged_by_its_own_answers(analysed: Any) -> None:
    *_, told, _ = analysed
    answers = told["overthinking"]["answers"]
    assert answers["n"] == 6
    assert answers["better"] + answers["worse"] <= 6
    assert answers["difference"] == told["free_running"]["policy"]["difference"]
    assert 1 <= told["free_running"]["policy"]["mean_depth"] <= told["layers"]


def test_every_token_is_of_one_kind(analysed: Any) -> None:
    *_, told, _ = analysed
    for needed in told["needed_depth"].values():
        for by in ("position", "class"):
            assert sum(kind["n"] for kind in needed[by].values()) == needed["all"]["n"]
        assert sum(needed["all"]["depth_shares"].values()) == pytest.approx(1)


def test_a_backbone_alone_has_the_lens_alone(backbone: Build, exits: Build) -> None:
    adapter, encoder = model(backbone, exits, "blip2-opt")
    told = analyse(
        adapter.backbone,
        encoder,
        fakes.examples(3),
        AnalysisConfig(decode_depths=(2,), **QUICK),  # type: ignore[arg-type]
    )
    assert told["exits"] == []
    assert list(told["teacher_forced"]) == list(told["needed_depth"]) == ["lens"]
    assert told["free_running"]["lens"]["identical"]["depths"] == [2, told["layers"]]
    assert "policy" not in told["free_running"]


def test_without_answers_it_tells_agreement_only(backbone: Build, exits: Build) -> None:
    adapter, encoder = model(backbone, exits, "blip2-opt")
    bare = [Example(e.image, e.prompt, (), e.key) for e in fakes.examples(3)]
    told = analyse(adapter, encoder, bare, AnalysisConfig(**QUICK))  # type: ignore[arg-type]
    assert list(told["teacher_forced"]["exits"]) == ["agreement"]
    assert list(told["free_running"]["exits"]) == ["identical"]
    assert "overthinking" not in told
    assert "quality" not in plots.analysis_plots(told)


def test_a_policy_that_no_replay_tells_is_judged_by_answers_alone(
    backbone: Build, exits: Build, caplog: pytest.LogCaptureFixture
) -> None:
    adapter, encoder = model(backbone, exits, "blip2-opt")
    lossless = adapter.with_policy(
        ExitPolicy({d: 0.3 for d in adapter.exits.depths}, lossless=True)
    )
    told = analyse(
        lossless, encoder, fakes.examples(3), AnalysisConfig(decode_depths=(2,), **QUICK)  # type: ignore[arg-type]
    )  # fmt: skip
    assert "policy" not in told["overthinking"]
    assert told["free_running"]["policy"]["identical"]["value"] == 1.0
    assert "cannot be replayed" in caplog.text


def test_ten_lines_tell_what_was_found(analysed: Any, backbone: Build, exits: Build) -> None:
    adapter, encoder, told, _ = analysed
    lines = summary(told).splitlines()
    assert len(lines) == 10
    assert "6 examples of 6 images" in lines[0] and told["free_running"]["metric"] in lines[0]
    found = told["teacher_forced"]["exits"]["agreement"]
    row = next(line for line in lines if line.startswith("tokens as the final layer's, exits"))
    assert row.split()[-len(found["values"]) :] == [f"{v['value']:.1%}" for v in found["values"]]
    bare = [Example(e.image, e.prompt, (), e.key) for e in fakes.examples(2)]
    config = AnalysisConfig(decode_depths=(2,), **QUICK)  # type: ignore[arg-type]
    few = summary(analyse(adapter.backbone, encoder, bare, config)).splitlines()
    assert "no exits" in few[0] and len(few) == 5


# -- the policy, as decoding has it ----------------------------------------------------------------


def learnt(backbone: Build, exits: Build, name: str) -> Adapter:
    """An adapter whose policy reads a shortlist."""
    wide, trained = backbone(name, wide=4.0), exits(name, wide=4.0)
    encoder = InputProcessor(wide, fakes.Blip2FakeProcessor(name))
    written = full_model_answers(encoder, fakes.examples(6), batch_size=6, max_new_tokens=6)
    said = torch.tensor(sorted({token for row in written for token in row.ids}))
    policy = ExitPolicy(
        dict.fromkeys(trained.depths, 0.145),
        shortlist=True,
    )
    return Adapter(wide, ExitSet(trained, said), policy)


@pytest.mark.parametrize("kind", ["shortlist", "a prompt that is not causal"])
def test_the_policy_is_replayed_as_it_decodes(
    kind: str, backbone: Build, exits: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the full model's own answers, up to the first token that differs, both run as deep."""
    name = "blip2-opt" if kind.startswith("shortlist") else "paligemma"
    adapter, encoder = model(backbone, exits, name)
    if name == "blip2-opt":
        adapter = learnt(backbone, exits, name)
    else:
        adapter = adapter.with_policy(
            ExitPolicy({adapter.exits.depths[0]: 0.01})
        )
    written = full_model_answers(encoder, fakes.examples(6), batch_size=6, max_new_tokens=6)
    texts = encoder.tokenizer.batch_decode([row.ids for row in written], skip_special_tokens=True)
    examples = [
        replace(row.example, answers=(text.strip(),))
        for row, text in zip(written, texts, strict=True)
        if text.strip()
    ]
    replayed: list[Any] = []
    monkeypatch.setattr(module, "by_policy", lambda *given: replayed.append(given[1]) or {})
    analyse(adapter, encoder, examples, AnalysisConfig(decode_depths=(2,), **QUICK))  # type: ignore[arg-type]
    compared = 0
    for example, ran in zip(examples, replayed[0].tolist(), strict=True):
        result = adapter.generate(encoder.prompts([example]), max_new_tokens=6, do_sample=False)
        wanted = encoder.answer_ids(example.prompt, example.answers[0])
        made = zip(result.new_tokens[0].tolist(), result.depths[0].tolist(), strict=True)
        for (token, depth), right, told in zip(made, wanted, ran, strict=False):
            assert depth == told
            compared += 1
            if token != right:
                break
    assert compared >= len(examples)


# -- plots ---------------------------------------------------------------------------------------


def test_plots_are_the_files_ask_for_nothing_and_draw_in_their_texts_colour(analysed: Any) -> None:
    *_, told, out = analysed
    for name, svg in plots.analysis_plots(json.loads(json.dumps(told))).items():
        assert svg == (out / f"{name}.svg").read_text()
        assert "currentColor" in svg
        assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", svg)
        assert svg.startswith('<svg role="img" aria-label="')


# -- mistakes ------------------------------------------------------------------------------------


def test_mistakes_are_told(backbone: Build, exits: Build) -> None:
    adapter, encoder = model(backbone, exits, "blip2-opt")
    with pytest.raises(DataError, match="no examples"):
        analyse(adapter, encoder, [])
    with pytest.raises(InputError, match="batch_size is 0; confidence is 1"):
        AnalysisConfig(batch_size=0, confidence=1.0)
    with pytest.raises(InputError, match="exact_match"):
        analyse(adapter, encoder, fakes.examples(1), AnalysisConfig(metric="exact-match"))
    with pytest.raises(InputError, match="do not fit"):
        analyse(adapter, encoder, fakes.examples(1), AnalysisConfig(decode_depths=(99,)))


def test_pictures_of_the_training_are_refused(backbone: Build, exits: Build) -> None:
    adapter, encoder = model(backbone, exits, "blip2-opt")
    examples = fakes.examples(2)
    trained = replace(adapter, seen={"train": sorted(picture_digests(examples))})
    with pytest.raises(DataError, match="were used in training"):
        analyse(trained, encoder, examples)


def test_the_command_needs_something_to_analyse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["analyse", "--data", "none.jsonl", "--out", str(tmp_path)]
    assert cli.main(arguments) == 1
    assert "Name exits first, or give --backbone." in capsys.readouterr().err


def test_words_fall_into_classes() -> None:
    classes = [word_class(text, rank) for text, rank in ((" 7", 0), (",", 0), ("a", 3), ("ox", 40))]
    assert classes == ["number", "punctuation", "10 most frequent", "other words"]
