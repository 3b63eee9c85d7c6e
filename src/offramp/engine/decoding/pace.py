"""Whether exits pay: found out from what an engine's own calls take.

While exits are used, the tokens that calls settle a second are counted. Now and then, with nothing
waiting, a call at full depth is made beside them and timed; what it says is not used, so no answer
changes. Where full depth is faster, requests that name no mode, and lossless ones, are answered by
the full model from their first token on; after some answers the exits are tried again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

SHARE = 0.01
"""Of the time that trial calls may take; the first is made at once."""
WARM = 8
"""Calls over about as many sequences before full depth is tried with them."""
ENOUGH = 48
"""Tokens that exits must have settled before they are judged."""
RETRY = 128
"""Answers at full depth until exits are tried again; each time twice as many, to 8 times."""
MEMORY = 1000
"""Tokens after which what was counted so far counts by half."""


@dataclass
class Rate:
    """Tokens settled, and the seconds that it took."""

    tokens: float = 0.0
    seconds: float = 0.0

    def add(self, tokens: float, seconds: float) -> None:
        self.tokens += tokens
        self.seconds += seconds
        if self.tokens > MEMORY:
            self.tokens, self.seconds = self.tokens / 2, self.seconds / 2

    @property
    def speed(self) -> float:
        """Tokens a second; 0 before any were seen."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


class Pace:
    """Judges the exits of an engine, for sequences whose tokens may exit and for lossless ones.

    fixed: whether exits are taken to pay, whatever calls take. clock: returns seconds.
    """

    def __init__(self, fixed: bool, clock: Callable[[], float] = time.perf_counter) -> None:
        self._fixed, self._clock = fixed, clock
        self._pays = {True: True, False: True}  # by whether tokens may exit
        self._exits = {True: Rate(), False: Rate()}
        self._full = Rate()
        self._rows = 0.0
        self._alike = 0  # calls over about as many sequences
        self._total = self._tried = 0.0  # seconds
        self._answers = {True: 0, False: 0}  # at full depth instead
        self._patience = {True: RETRY, False: RETRY}

    def exits_pay(self, *, exiting: bool) -> bool:
        """Whether exits are faster than full depth: where tokens may exit, or lossless."""
        return self._pays[exiting]

    @property
    def speeds(self) -> dict[str, float]:
        """Tokens a second as last seen: of early exit, lossless, and full depth; 0: not yet."""
        early, lossless = self._exits[True].speed, self._exits[False].speed
        return {"early_exit": early, "lossless": lossless, "full": self._full.speed}

    def wants_trial(self) -> bool:
        """Whether full depth should be timed beside the exits, once nothing waits."""
        if self._fixed or self._alike < WARM:
            return False
        if not self._full.tokens:
            return True
        price = self._rows * self._full.seconds / self._full.tokens
        return self._tried + price <= SHARE * self._total

    def note(self, rows: int, settled: int, took: float, *, exiting: bool, exits: bool) -> None:
        """A call over `rows` sequences settled so many tokens in `took` seconds.

        exiting: whether the tokens of any of them may exit. exits: whether exits were used.
        """
        self._total += took
        if not exits:
            if not self._fixed:
                self._full.add(rows, took)
            return
        if rows > 1.5 * self._rows or 1.5 * rows < self._rows:  # other speeds hold
            self._rows, self._alike, self._full = rows, 0, Rate()
            self._exits = {True: Rate(), False: Rate()}
        self._alike += 1
        self._exits[exiting].add(settled, took)
        self._judge(exiting)

    def tried(self, rows: int, took: float) -> None:
        """A trial call at full depth over so many sequences."""
        self._tried += took
        self._total += took
        self._full.add(rows, took)
        for exiting in self._exits:
            self._judge(exiting)

    def answered(self, *, exiting: bool) -> None:
        """A request that might have used exits was answered at full depth instead."""
        self._answers[exiting] += 1
        if self._answers[exiting] >= self._patience[exiting]:
            self._answers[exiting] = 0
            self._patience[exiting] = min(8 * RETRY, 2 * self._patience[exiting])
            self._pays[exiting], self._exits[exiting] = True, Rate()

    def _judge(self, exiting: bool) -> None:
        seen = self._exits[exiting]
        if not self._fixed and self._full.tokens and seen.tokens >= ENOUGH:
            self._pays[exiting] = seen.speed >= self._full.speed
