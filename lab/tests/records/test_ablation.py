"""Laws of the ablation: seeds are paired, and what may exit is what a replay says may exit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest

from offramp.adapter import Adapter
from offramp.answers import full_model_answers
from offramp.calibration.replay import replay
from offramp.data.scenes.tasks import captions, questions
from offramp.models.input_processor import InputProcessor
from offramp.training.config import TrainConfig
from offramp_lab.records import ablation
from offramp_lab.records.subjects import is_right

Build = Callable[..., Any]


@pytest.fixture(scope="module")
def tool() -> Any:
    return ablation


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5"])
@pytest.mark.parametrize("kept", [0.99, 0.75])
def test_as_many_tokens_may_leave_as_the_best_threshold_of_a_replay_lets(
    tool: Any,
    backbone: Build,
    exits: Build,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    kept: float,
) -> None:
    monkeypatch.setattr(tool, "KEPT", kept)
    monkeypatch.setattr(tool, "LONGEST", 6)
    trained, encoder = (
        exits(name, wide=4.0),
        InputProcessor(backbone(name, wide=4.0), fakes.Blip2FakeProcessor(name)),
    )
    examples = fakes.examples(12)
    place = tool.Place(encoder, examples)
    figures = place.judged(Adapter(encoder.backbone, trained))
    rows = full_model_answers(encoder, examples, batch_size=64, max_new_tokens=6)
    found = replay(encoder, trained, rows)
    shares = [0.0]
    for threshold in np.unique(found.scores[2][found.mask]):
        depths = found.depths({2: float(threshold)})
        if found.differs(depths).mean() <= 1 - kept:
            shares.append(float((depths == 2).sum() / found.mask.sum()))
    assert figures["may_leave"] == pytest.approx(max(shares))
    right = (found.said[2] == found.targets)[found.mask].mean()
    assert figures["tokens"] == pytest.approx(right)
    assert figures["identical"] == 1 - found.differs(found.depths({2: 0.0})).mean()


def row(game: str, seed: int, value: float) -> dict[str, Any]:
    figures = dict.fromkeys(("quality", "identical", "tokens", "may_leave"), value)
    cell = {"kind": "opt", "setting": "no labels", "game": game, "seed": seed}
    return {"cell": cell, "in": figures, "out": figures}


def test_differences_are_paired_over_seeds(tool: Any) -> None:
    ours, theirs = (0.5, 0.7, 0.9), (0.4, 0.7, 0.7)
    rows = [row("free", s, v) for s, v in enumerate(ours)]
    rows += [row("distillation", s, v) for s, v in enumerate(theirs)]
    by_game = {cell["game"]: cell["quality_in"] for cell in tool.table(rows[::-1])}
    assert by_game["free"]["mean"] == pytest.approx(0.7)
    assert by_game["free"]["standard_deviation"] == pytest.approx(0.2)
    assert by_game["free"]["difference"] == pytest.approx(0.1)
    # sd of (0.1, 0, 0.2) is 0.1, and t(0.975, 2) is 4.3027
    half = 4.3027 * 0.1 / 3**0.5
    assert by_game["free"]["high"] - 0.1 == pytest.approx(half, rel=1e-4)
    assert by_game["free"]["low"] - 0.1 == pytest.approx(-half, rel=1e-4)
    assert by_game["distillation"]["difference"] == 0


def test_one_seed_has_no_interval(tool: Any) -> None:
    rows = [row("free", 0, 0.5), row("distillation", 0, 0.4)]
    assert all(cell["quality_in"]["low"] is None for cell in tool.table(rows))


def test_every_game_can_be_trained_in_its_setting(tool: Any) -> None:
    for setting in tool.SETTINGS.values():
        for game in setting.games("opt").values():
            TrainConfig(**setting.regime, **game)
    games = tool.SETTINGS["no labels"].games("t5")
    assert games["unconditional, 0.1"] == {"adversarial": 0.1, "conditional": False}


def test_runs_of_other_sizes_are_other_runs(tool: Any) -> None:
    cells = [cell for group in tool.cells(2) for cell in group]
    keys = {cell.key(sizes) for cell in cells for sizes in (tool.QUICK, tool.Sizes())}
    assert len(keys) == 2 * len(cells)


def test_answers_about_damaged_images_are_judged_like_those_about_whole_ones(tool: Any) -> None:
    tasks = [captions("test", 6), questions("test", 6)]
    for task in tasks:
        others = [example.answers[0] for example in task.examples[1:] + task.examples[:1]]
        for before, after, other in zip(
            task.examples, tool.damaged(task.examples), others, strict=True
        ):
            assert is_right(before.answers[0], after)
            for text in (before.answers[0], other):
                assert is_right(text, after) == is_right(text, before) == task.correct(text, before)
            assert before.open_image().tobytes() != after.open_image().tobytes()


def test_what_was_run_is_not_run_again(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    class Bench:
        def __init__(self, *_: Any) -> None: ...

        def full(self) -> dict[str, float]:
            return {}

        def run(self, group: Any) -> Any:
            for cell in group:
                ran.append(cell)
                yield {"key": cell.key(tool.QUICK)}

    monkeypatch.setattr(tool, "Bench", Bench)
    groups = list(tool.cells(1))
    tool._run(groups[0::2], tmp_path, 0, tool.QUICK)
    tool._run(groups, tmp_path, 1, tool.QUICK)
    tool._run(groups, tmp_path, 0, tool.QUICK)
    assert sorted(ran) == sorted(cell for group in groups for cell in group)


def test_a_setting_that_is_run_again_takes_its_place_and_the_others_stay(
    tool: Any, tmp_path: Path
) -> None:
    def record(value: float, *settings: str) -> list[dict[str, Any]]:
        cells = [cell for group in tool.cells(2, settings) for cell in group]
        return [{**row("", 0, value), "cell": cell._asdict()} for cell in cells]

    path, renewed = tmp_path / "record.json", "10% labels"
    before = json.loads(json.dumps(tool.table(record(0.5, *tool.SETTINGS))))
    path.write_text(json.dumps({"cells": before, "depth": 2}))
    tool._renew(path, record(0.75, renewed))
    after = json.loads(path.read_text())
    assert after["depth"] == 2 and len(after["cells"]) == len(before)
    for old, new in zip(before, after["cells"], strict=True):
        assert new["game"] == old["game"] and new["setting"] == old["setting"]
        assert new["quality_in"]["mean"] == (0.75 if new["setting"] == renewed else 0.5)
    assert [one["settings"] for one in after["renewed"]] == [[renewed]]
