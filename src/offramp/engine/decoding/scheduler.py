"""Which segment runs next, and for whom.

Where exits are used, calls below the first exit and calls above it take turns. The deep layers cost
nearly the same over one token and over many, so they wait for company; but a sequence that parked
idles meanwhile, and what is built on a guess that is wrong is lost.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Literal, NamedTuple

from offramp.engine.decoding.sequence import Sequence
from offramp.errors import InputError

Call = Literal["feed", "deep", "flush", "full"]
"""feed: the next token of every sequence, up to the first exit. deep: what waits above it, of those
whose turn it is (`due`); flush: of all. full: the next token of all through all layers."""


class Load(NamedTuple):
    """The sequences under way. ready: can be fed. idle: cannot, before a deep call. oldest: calls
    since the oldest question to the deep layers. asks: whether there is any."""

    rows: int
    ready: int
    idle: int
    oldest: int
    asks: bool

    @classmethod
    def of(cls, rows: Many[Sequence], longest: int | None) -> Load:
        """Of at least one sequence, each with at most `longest` columns waiting."""
        return cls(
            rows=len(rows),
            ready=sum(row.ready(longest) for row in rows),
            idle=sum(row.idle(longest) for row in rows),
            oldest=max(row.waited for row in rows),
            asks=any(row.asked for row in rows),
        )


@dataclass(frozen=True)
class Schedule:
    """When the deep layers run: once the oldest question has waited `patience` calls (0: as soon as
    there is one), once `idle` sequences are, or once none can be fed.

    Over long runs a deadline alone is within 5% of the best.

    Raises:
        InputError: a patience below 0, no idle sequence.
    """

    patience: int = 4
    idle: int = 4

    def __post_init__(self) -> None:
        if self.patience < 0 or self.idle < 1:
            raise InputError(
                f"A schedule of {self.patience} calls and {self.idle} rows never runs.",
                "Give whole numbers, of rows from 1.",
            )

    @classmethod
    def of(cls, slots: int) -> Schedule:
        """The usual one of so many sequences at a time."""
        return cls(idle=max(1, slots // 2))

    def next_call(self, load: Load) -> Call:
        """Feed or deep, for at least one sequence."""
        waited = load.oldest >= self.patience and (load.asks or load.oldest > 0)
        return "deep" if waited or load.idle >= self.idle or not load.ready else "feed"


AT_ONCE = Schedule(0, 1)
"""The deep layers run as soon as there is a question."""


def due(rows: Many[Sequence], longest: int | None) -> list[bool]:
    """Which sequences a deep call takes: those with a question; and once one has `longest` columns
    waiting, so that it cannot be fed, all that have half as many."""
    if longest is None:
        return [bool(row.asked) for row in rows]
    full = any(row.pending(1) >= longest for row in rows)
    return [bool(row.asked) or (full and row.pending(1) >= max(1, longest // 2)) for row in rows]


@dataclass
class Tally:
    """What the first exit did: tokens that exited, were guessed and parked; guesses that the deep
    layers ruled on, and that they confirmed."""

    exited: float = 0.0
    guessed: float = 0.0
    parked: float = 0.0
    ruled: float = 0.0
    right: float = 0.0

    @property
    def tokens(self) -> float:
        return self.exited + self.guessed + self.parked

    def rule(self, right: bool) -> None:
        """Count what the deep layers said of a guess."""
        self.ruled += 1
        self.right += right
