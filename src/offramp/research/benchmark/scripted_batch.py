"""A batch whose exits do as a script says, at the cost of the real ones: speed on any weights."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from offramp.engine.slots.runner import States
from offramp.serving.rows.choices import Chooser, Question, Verdict
from offramp.serving.rows.row import Choice
from offramp.serving.rows.rules import RowRules
from offramp.serving.rows.slot_batch import Seat, SlotBatch


@dataclass(frozen=True)
class Script:
    """exit_rate: share of tokens that exit. right: share of guesses that the deep layers confirm.

    Both are drawn for a place in an answer, so that going back does not draw anew.
    """

    exit_rate: float
    right: float
    seed: int = 0

    def happens(self, kind: str, rate: float, row: int, place: int) -> bool:
        """Whether what happens with `rate` does at this place of the row."""
        return random.Random(f"{self.seed} {kind} {row} {place}").random() < rate


class ScriptedBatch(SlotBatch):
    """Rows with a threshold of 0.5 exit, and guesses are right, as `script` says."""

    def __init__(self, *args: Any, script: Script, **more: Any) -> None:
        super().__init__(*args, **more)
        self._script = script
        self.chooser: Chooser = _ScriptedChooser(self.chooser, script)

    def _full_choice(
        self, seat: Seat, place: int, largest: int, logits: Tensor, score: float
    ) -> Choice:
        choice = super()._full_choice(seat, place, largest, logits, score)
        asked = seat.row.asked(place)
        if asked.token < 0:  # it parked: nothing was guessed
            return choice
        row = _number(seat.rules)
        right = self._script.happens("right", self._script.right, row, place)
        said = asked.token if right else (asked.token + 1) % self.backbone.vocabulary
        return replace(choice, token=said)


class _ScriptedChooser(Chooser):
    """Runs the exits as usual, and replaces their scores by what the script says."""

    def __init__(self, real: Chooser, script: Script) -> None:
        self.__dict__.update(real.__dict__)
        self._script = script

    def verdicts(
        self, depth: int, states: States, asked: Sequence[Question | None]
    ) -> list[Verdict | Exception | None]:
        verdicts = super().verdicts(depth, states, asked)
        for i, (question, verdict) in enumerate(zip(asked, verdicts, strict=True)):
            if question is not None and isinstance(verdict, Verdict):
                rules, before = question
                rate, row = self._script.exit_rate, _number(rules)
                exits = self._script.happens("exit", rate, row, len(before))
                verdicts[i] = replace(verdict, score=float(exits))
        return verdicts


_numbers: WeakKeyDictionary[RowRules, int] = WeakKeyDictionary()


def _number(rules: RowRules) -> int:
    """A number of its own for each row, in the order in which they first come."""
    return _numbers.setdefault(rules, len(_numbers))
