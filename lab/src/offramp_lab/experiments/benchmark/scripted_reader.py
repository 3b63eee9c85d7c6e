"""Exits that do as a script says, at the cost of the real ones or at none: speed on any weights."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from offramp.engine.decoding.exit_reader import ExitReader
from offramp.engine.decoding.reader import Looks, Question, Word
from offramp.engine.decoding.rule import Verdict
from offramp.engine.exit_check import ExitCheck, ExitOutput

Says = Callable[[str, int, int], bool]
"""Whether the token of a sequence at a place in its answer exits ("exit"), or is right ("right").
Sequences are numbered as exits first see them."""


def drawn(exit_rate: float, right: float, seed: int = 0) -> Says:
    """exit_rate: share of tokens that exit. right: share of guesses that the deep layers confirm.

    Both are drawn for a place in an answer, so that going back does not draw anew.
    """
    rates = {"exit": exit_rate, "right": right}

    def says(kind: str, row: int, place: int) -> bool:
        return random.Random(f"{seed} {kind} {row} {place}").random() < rates[kind]

    return says


class ScriptedReader(ExitReader):
    """Tokens with a threshold above 0 exit, and guesses are right, as `says` says. Exits, heads and
    scores run as usual."""

    def __init__(self, *args: Any, says: Says, **more: Any) -> None:
        super().__init__(*args, **more)
        self._script, self._vocabulary = _Heard(says), self._backbone.vocabulary

    def scores(self, look: ExitCheck, asked: Sequence[Question | None]) -> Sequence[float]:
        super().scores(look, asked)
        return [float("nan") if q is None else self._script.score(q) for q in asked]

    def verdicts(
        self, depth: int, output: ExitOutput, asked: Sequence[Question | None]
    ) -> list[Verdict | Exception | None]:
        verdicts = super().verdicts(depth, output, asked)
        for question, verdict in zip(asked, verdicts, strict=True):
            if question is not None and isinstance(verdict, Verdict):
                self._script.hear(question, verdict.token)
        return verdicts

    def words(self, final: Tensor) -> Word:
        word, says = super().words(final), self._script.last_word
        return lambda place, question: says(question, word(place, question), self._vocabulary)


class ToldReader(ExitReader):
    """The same where nothing runs: token 0 is what exits say, and the right one."""

    def __init__(self, says: Says) -> None:
        self._script = _Heard(says)
        self.follows = self.watches = False

    def looks(self, asked: Sequence[Question | None]) -> Looks:
        return lambda *_: False

    def verdicts(
        self, depth: int, output: ExitOutput, asked: Sequence[Question | None]
    ) -> list[Verdict | Exception | None]:
        for question in asked:
            if question is not None:
                self._script.hear(question, 0)
        return [None if q is None else Verdict(0, self._script.score(q)) for q in asked]

    def words(self, final: Tensor) -> Word:
        return lambda _, question: self._script.last_word(question, 0, 2)


class _Heard:
    """Numbers sequences, and remembers what exits said at each of their places."""

    def __init__(self, says: Says) -> None:
        self._says = says
        self._of: WeakKeyDictionary[Any, tuple[int, dict[int, int]]] = WeakKeyDictionary()
        self._given = 0

    def _known(self, question: Question) -> tuple[int, dict[int, int]]:
        if question.sampler not in self._of:
            self._of[question.sampler] = self._given, {}
            self._given += 1
        return self._of[question.sampler]

    def score(self, question: Question) -> float:
        """1 where the token exits, else 0."""
        number, _ = self._known(question)
        return float(self._says("exit", number, len(question.before)))

    def hear(self, question: Question, token: int) -> None:
        """An exit said a token; below 0: none."""
        _, said = self._known(question)
        said[len(question.before)] = token

    def last_word(self, question: Question, word: int, vocabulary: int) -> int:
        """The full model's: what an exit said there, or another token; its own where none did."""
        number, said = self._known(question)
        place = len(question.before)
        token = said.get(place, -1)
        if token < 0:
            return word
        return token if self._says("right", number, place) else (token + 1) % vocabulary
