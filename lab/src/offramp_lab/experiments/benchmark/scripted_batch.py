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

    def happens(self, kind: str, row: int, place: int) -> bool:
        """Whether the token at this place of the row exits ("exit"), or is right ("right")."""
        rate = {"exit": self.exit_rate, "right": self.right}[kind]
        return random.Random(f"{self.seed} {kind} {row} {place}").random() < rate


class ScriptedBatch(SlotBatch):
    """Rows with a threshold of 0.5 exit, and guesses are right, as `script` says."""

    def __init__(self, *args: Any, script: Script, **more: Any) -> None:
        super().__init__(*args, **more)
        self._script, self._number = script, _Numbers()
        self.chooser: Chooser = _ScriptedChooser(self.chooser, script, self._number)

    def _full_choice(
        self, seat: Seat, place: int, largest: int, logits: Tensor, score: float
    ) -> Choice:
        choice = super()._full_choice(seat, place, largest, logits, score)
        asked = seat.row.asked(place)
        if asked.token < 0:  # it parked: nothing was guessed
            return choice
        right = self._script.happens("right", self._number(seat.rules), place)
        said = asked.token if right else (asked.token + 1) % self.backbone.vocabulary
        return replace(choice, token=said)


class _ScriptedChooser(Chooser):
    """Runs the exits as usual, and replaces their scores by what the script says."""

    def __init__(self, real: Chooser, script: Script, number: _Numbers) -> None:
        self.__dict__.update(real.__dict__)
        self._script, self._number = script, number

    def verdicts(
        self, depth: int, states: States, asked: Sequence[Question | None]
    ) -> list[Verdict | Exception | None]:
        verdicts = super().verdicts(depth, states, asked)
        for i, (question, verdict) in enumerate(zip(asked, verdicts, strict=True)):
            if question is not None and isinstance(verdict, Verdict):
                rules, before = question
                exits = self._script.happens("exit", self._number(rules), len(before))
                verdicts[i] = replace(verdict, score=float(exits))
        return verdicts


class _Numbers:
    """Numbers the rows in the order in which they first come."""

    def __init__(self) -> None:
        self._of: WeakKeyDictionary[RowRules, int] = WeakKeyDictionary()
        self._given = 0

    def __call__(self, rules: RowRules) -> int:
        if rules not in self._of:
            self._of[rules] = self._given
            self._given += 1
        return self._of[rules]
