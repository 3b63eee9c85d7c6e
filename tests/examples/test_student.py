"""Laws of the student's training: the best weights are kept, what was cut off goes on, and
reinforcement writes the last layer alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from examples.photo_vlm import student
from examples.photo_vlm.student import keep, train
from torch import Tensor, nn

ROWS: list[Any] = [(torch.zeros(1), [n], [n], torch.zeros(1)) for n in range(40)]


class Fake(nn.Module):
    """Its loss on what it learns falls with each step; on what is held out, only until `turn`."""

    def __init__(self, turn: float) -> None:
        super().__init__()
        self.weight, self.turn = nn.Parameter(torch.zeros(())), turn

    def forward(self, rows: Any) -> Tensor:
        learning = torch.is_grad_enabled()
        loss = -self.weight if learning else (self.weight - self.turn).abs()
        return loss.expand(len(rows))


@pytest.fixture(autouse=True)
def seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second passes whenever the clock is read."""
    clock = itertools.count()
    monkeypatch.setattr(student.time, "process_time", lambda: float(next(clock)))
    monkeypatch.setattr(student, "WARM", 1)


def told(seconds: float, file: Path, turn: float = 1.0) -> dict[str, Any]:
    train(Fake(turn), ROWS, seconds, file, captions=40)  # type: ignore[arg-type]
    found: dict[str, Any] = torch.load(file, weights_only=True)
    return found


def test_the_weights_are_those_of_the_least_loss_on_what_is_held_out(tmp_path: Path) -> None:
    found = told(100, tmp_path / "a.pt", turn=0.01)
    assert len(found["checks"]) == student.CHECKS and found["captions"] == 40
    assert float(found["student"]["weight"]) < float(found["latest"]["weight"])
    nearest = abs(float(found["student"]["weight"]) - 0.01)
    assert nearest == pytest.approx(min(found["checks"])) and found["best"] < found["steps"]


def test_training_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    whole = told(100, tmp_path / "whole.pt")
    file = tmp_path / "a new folder" / "cut.pt"
    steps = itertools.count()

    class Cut(Fake):
        def forward(self, rows: Any) -> Tensor:
            if torch.is_grad_enabled() and next(steps) == 40:
                raise KeyboardInterrupt
            return super().forward(rows)

    with pytest.raises(KeyboardInterrupt):
        train(Cut(1.0), ROWS, 100, file, captions=40)  # type: ignore[arg-type]
    cut = torch.load(file, weights_only=True)
    assert 0 < cut["steps"] <= 40
    again = told(100, file)
    assert again["steps"] == whole["steps"] and again["seconds"] >= 100
    torch.testing.assert_close(again["latest"]["weight"], whole["latest"]["weight"])


def test_reinforcement_writes_the_last_layer_alone(tmp_path: Path) -> None:
    weights = {f"layers.{n}.weight": torch.full((1, 1), float(n)) for n in range(11)}
    file = tmp_path / "student.pt"
    torch.save({"student": weights, "steps": 7}, file)
    layer = nn.Linear(1, 1)  # its bias stands for the drafts, which a student has not
    keep(file, layer, steps=700)
    found = torch.load(file, weights_only=True)
    assert found["steps"] == 7 and found["reinforced"] == {"steps": 700}
    assert found["student"].keys() == weights.keys()
    for name, weight in found["student"].items():
        assert torch.equal(weight, layer.weight if name == "layers.10.weight" else weights[name])
