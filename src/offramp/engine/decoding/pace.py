"""Whether exits pay: found out from what calls take.

While exits are used, the tokens that calls settle a second are counted. Now and then a call at full
depth is timed beside them. Where full depth is faster, exits are left out, and after some time
tried again. No answer changes.

In a batch engine (`Pace`) a trial's token is not used, and whole requests are answered by the full
model: those that name no mode, and lossless ones. Elsewhere lossless answers (`DraftPace`) write a
token by a trial, and drafts are left out behind a first token, later on, or both: an answer of one
word is over before they pay.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

log = logging.getLogger(__name__)

SHARE = 0.01
"""Of the time that trial calls may take; the first is made at once."""
WARM = 8
"""Calls over about as many sequences before full depth is tried with them."""
ENOUGH = 48
"""Tokens that exits must have settled before they are judged."""
FEW, SURE, LONG = 8, 2.0, 400
"""The same of drafts outside of a batch engine, standard errors by which they must then be slower,
and tokens after which what was counted of them counts by half: in four rounds in a row few drafts
may be right by chance."""
TRIES = 4
"""Turns of drafts there before full depth is tried, and of full depth before they are judged. One
with a call over so many tokens as none before is not counted: what is made once is made in it, as
code is."""
RETRY = 128
"""Answers at full depth until exits are tried again; each time twice as many, to 8 times."""
MEMORY = 1000
"""Tokens after which what was counted so far counts by half."""


@dataclass
class Rate:
    """Tokens settled, their squares, the calls or turns that settled them, and the seconds that it
    took. memory: as `MEMORY`."""

    memory: float = MEMORY
    tokens: float = 0.0
    squares: float = 0.0
    calls: float = 0.0
    seconds: float = 0.0

    def add(self, tokens: float, seconds: float) -> None:
        self.tokens += tokens
        self.squares += tokens**2
        self.calls += 1
        self.seconds += seconds
        if self.tokens > self.memory:
            self.tokens, self.squares = self.tokens / 2, self.squares / 2
            self.calls, self.seconds = self.calls / 2, self.seconds / 2

    @property
    def speed(self) -> float:
        """Tokens a second; 0 before any were seen."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def error(self) -> float:
        """Standard error of the tokens that a call settles, as a share of their mean."""
        mean = self.tokens / self.calls
        return math.sqrt(max(0.0, self.squares / self.calls - mean**2) / self.calls) / mean


@dataclass
class Judged:
    """Exits, as one kind of answer uses them. pays: whether they are faster than full depth, as far
    as is known. enough: tokens after which they are judged; sure: standard errors by which they
    must be slower to be left out. seen: what they settled."""

    enough: float
    seen: Rate
    sure: float = 0.0
    pays: bool = True
    _instead: int = 0
    _patience: int = field(default_factory=lambda: RETRY)

    def judge(self, full: Rate) -> None:
        """Against full depth, once enough was seen of both."""
        if full.tokens and self.seen.tokens >= self.enough:
            least = 1 + self.sure * self.seen.error
            self.pays = least * self.seen.speed >= full.speed

    def left_out(self) -> None:
        """They were left out once; try them again where that was often enough."""
        self._instead += 1
        if self._instead >= self._patience:
            self._instead, self._patience = 0, min(8 * RETRY, 2 * self._patience)
            self.pays, self.seen = True, Rate(self.seen.memory)


class Pace:
    """Judges the exits of an engine, for sequences whose tokens may exit and for lossless ones.

    fixed: whether exits are taken to pay, whatever calls take. clock: returns seconds.
    """

    def __init__(self, fixed: bool, clock: Callable[[], float] = time.perf_counter) -> None:
        self._fixed, self._clock = fixed, clock
        self._exits = {may: Judged(ENOUGH, Rate()) for may in (True, False)}  # whether tokens exit
        self._full = Rate()
        self._rows = 0.0
        self._alike = 0  # calls over about as many sequences
        self._total = self._tried = 0.0  # seconds

    def exits_pay(self, *, exiting: bool) -> bool:
        """Whether exits are faster than full depth: where tokens may exit, or lossless."""
        return self._exits[exiting].pays

    @property
    def speeds(self) -> dict[str, float]:
        """Tokens a second as last seen: of early exit, lossless, and full depth; 0: not yet."""
        early, lossless = (self._exits[exiting].seen.speed for exiting in (True, False))
        return {"early_exit": early, "lossless": lossless, "full": self._full.speed}

    def wants_trial(self) -> bool:
        """Whether full depth should be timed beside the exits."""
        if self._fixed or self._alike < WARM:
            return False
        return _due(self._full, self._rows, self._tried, self._total)

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
            for each in self._exits.values():
                each.seen = Rate()
        self._alike += 1
        self._exits[exiting].seen.add(settled, took)
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
        self._exits[exiting].left_out()

    def _judge(self, exiting: bool) -> None:
        if not self._fixed:
            self._exits[exiting].judge(self._full)


class Turn(NamedTuple):
    """Of how many rows a turn is, and whether it is the first of their answers. It is from where
    nothing is in question to where nothing is again: a round of drafts and the call that verifies
    them, or a token at full depth."""

    rows: int
    first: bool


@dataclass
class _Turns:
    """What was seen of the turns of one number of rows. drafts: by whether they were the first.
    made: by whether drafted. calls: what calls there were, over how many tokens."""

    drafts: dict[bool, Judged] = field(
        default_factory=lambda: {b: Judged(FEW, Rate(LONG), SURE) for b in (True, False)}
    )
    full: Rate = field(default_factory=lambda: Rate(6 * FEW))  # a token a row: no luck in it
    made: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})
    calls: set[tuple[str, int]] = field(default_factory=set)
    total: float = 0.0  # seconds
    tried: float = 0.0


class DraftPace:
    """Judges the drafts of lossless answers that are not a batch engine's, for the first turn of
    answers and for later ones, and for each number of rows by itself.

    clock: returns seconds; where the processor computes, better the thread's own, which a busy
    machine leaves as they are (`clock_on`).
    """

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self.clock = clock or clock_on("cpu")
        self._turns: defaultdict[int, _Turns] = defaultdict(_Turns)
        self._warned: set[bool] = set()

    def drafts(self, turn: Turn) -> bool:
        """Whether it should be drafted."""
        of = self._turns[turn.rows]
        if not of.drafts[turn.first].pays:
            return False
        if of.made[False] < TRIES:
            return of.made[True] < TRIES
        return not _due(of.full, turn.rows, of.tried, of.total)

    def note(
        self, turn: Turn, tokens: int, took: float, *, drafted: bool, calls: Set[tuple[str, int]]
    ) -> None:
        """It settled so many tokens in `took` seconds, and nobody joined its rows meanwhile.

        calls: of what kind, and over how many tokens.
        """
        of = self._turns[turn.rows]
        own = of.drafts[turn.first]
        of.total += took
        of.made[drafted] += 1
        if calls <= of.calls:
            (own.seen if drafted else of.full).add(tokens, took)
        of.calls |= calls
        if not drafted and not own.pays:
            own.left_out()
            return
        of.tried += took * (not drafted)
        if of.made[False] >= TRIES:
            own.judge(of.full)
        if not own.pays and turn.first not in self._warned:
            self._warned.add(turn.first)
            log.warning(
                "Lossless drafts do not pay %s here: %.1f tokens a second, and %.1f at full depth, "
                "which runs there instead. They are tried again now and then.",
                "behind the first token of an answer" if turn.first else "within answers",
                own.seen.speed, of.full.speed,
            )  # fmt: skip


@contextmanager
def drafting(*models: Any) -> Iterator[None]:
    """While adapters or runtimes draft lossless answers in any case."""
    before = [getattr(model, "pace", None) for model in models]
    try:
        for model in models:
            model.pace = None
        yield
    finally:
        for model, pace in zip(models, before, strict=True):
            model.pace = pace


def clock_on(device: str) -> Callable[[], float]:
    """Seconds of what a kind of device computes for the thread that asks."""
    fine = time.get_clock_info("thread_time").resolution < 1e-4
    return time.thread_time if device == "cpu" and fine else time.perf_counter


def _due(full: Rate, rows: float, tried: float, total: float) -> bool:
    """Whether another trial at full depth keeps to its share of all seconds."""
    if not full.tokens:
        return True
    return tried + rows * full.seconds / full.tokens <= SHARE * total
