"""Token after token by programs: early exits, lossless drafts, the full model.

The next token is begun with the exit's token before it is known whether the exit was confident, so
that the device does not wait for the CPU. Where it was not, what was begun is void: its keys and
values are overwritten, and its state is not counted.
"""

from __future__ import annotations

import math

from offramp.runtimes.graphs.programs import Read, RowPrograms
from offramp.runtimes.one_row import GreedyRow


class GraphDecoder:
    """One greedy answer. layers: depth of the full model."""

    def __init__(self, programs: RowPrograms, sequence: GreedyRow, layers: int) -> None:
        self._programs, self._sequence, self._layers = programs, sequence, layers

    def full(self) -> None:
        """Write behind the first token until the answer is over; every token at full depth."""
        self._begin()
        read = self._programs.full()
        while self._sequence.live:
            ahead = self._programs.full() if self._room else None
            self._sequence.write(int(read()[0]), self._layers, math.nan)
            if ahead is None:
                return
            read = ahead

    def early_exit(self, depth: int, threshold: float) -> None:
        """The same; tokens exit at `depth` where the exit is confident."""
        programs = self._programs
        self._begin()
        read = programs.shallow()
        while True:
            ahead = self._shallow_ahead()
            token, confident, score = read()
            if confident:
                self._sequence.write(int(token), depth, score if threshold else math.nan)
                if not self._sequence.live:
                    return
                if ahead is None:  # no state more may wait
                    programs.deep()
                    programs.go_on(int(token), programs.column)
                    ahead = programs.shallow()
                read = ahead
            else:
                if ahead is not None:
                    programs.go_on(int(token), programs.column - 1, programs.pending - 1)
                behind = programs.pending - 1
                self._sequence.write(int(programs.deep()()[behind]), self._layers, score)
                if not self._sequence.live:
                    return
                read = programs.shallow()

    def lossless(self, depth: int, threshold: float, max_draft: int) -> list[tuple[int, int]]:
        """The full model's answer, drafted by the exit; (drafted, accepted) of each round."""
        programs, rounds = self._programs, []
        self._begin()
        while self._sequence.live:
            start = programs.column
            drafts, last = self._draft(threshold, max_draft)
            fed, written, accepted = programs.pending, 0, 0
            for token in map(int, programs.deep()()[:fed]):
                draft, score = drafts[written] if written < len(drafts) else (None, last)
                right = draft == token
                self._sequence.write(token, depth if right else self._layers, score)
                written, accepted = written + 1, accepted + right
                if not self._sequence.live or (draft is not None and not right):
                    break
            rounds.append((len(drafts), accepted))
            programs.go_on(token, start + written)
        return rounds

    def _draft(self, threshold: float, most: int) -> tuple[list[tuple[int, float]], float]:
        """Tokens and scores as long as the exit is confident, and the score behind them."""
        programs = self._programs
        drafts: list[tuple[int, float]] = []
        read = programs.shallow()
        while len(drafts) < most:
            ahead = self._shallow_ahead()
            token, confident, score = read()
            score = score if threshold else math.nan
            if confident:
                drafts.append((int(token), score))
            if not confident or self._sequence.ends([token for token, _ in drafts]):
                if ahead is not None:
                    programs.go_on(int(token), programs.column - 1, programs.pending - 1)
                return drafts, score
            assert ahead is not None
            read = ahead
        return drafts, math.nan

    # -- parts ---------------------------------------------------------------------------------

    @property
    def _room(self) -> bool:
        return self._programs.column < self._programs.limit

    def _begin(self) -> None:
        self._programs.go_on(self._sequence.last, self._programs.column)

    def _shallow_ahead(self) -> Read | None:
        """Begin the next token, if its state may wait too."""
        if self._programs.pending < self._programs.most and self._room:
            return self._programs.shallow()
        return None
