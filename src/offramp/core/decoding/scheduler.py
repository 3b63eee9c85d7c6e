"""Which call comes next, and for whom.

Where exits are used, calls below the first exit and calls above it take turns. The deep layers cost
nearly the same over one token and over many, so they are better run for several sequences at once;
but a sequence that waits for them writes nothing meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Literal, NamedTuple

from offramp.core.decoding.sequence import Sequence
from offramp.core.errors import InputError

Call = Literal["feed", "deep", "full"]
"""feed: the next token of every sequence: up to the first exit, where it may exit; of the others as
"full". deep: what is pending above the first exit, of those that wait. full: the next token through
all layers, or a round of those that draft."""


class Load(NamedTuple):
    """Counts over the sequences that are being written. ready: sequences that can be fed; idle:
    sequences that need a deep call first. oldest: calls since the first idle sequence began to
    wait. waits: whether any sequence waits."""

    ready: int
    idle: int
    oldest: int
    waits: bool

    @classmethod
    def of(cls, rows: Many[Sequence], longest: int | None) -> Load:
        """The load of at least one sequence, each with at most `longest` columns pending."""
        ready = sum([row.ready(longest) for row in rows])
        return cls(
            ready=ready,
            idle=len(rows) - ready,
            oldest=max([row.waited for row in rows]),
            waits=any([row.waits for row in rows]),
        )


@dataclass(frozen=True)
class Schedule:
    """The rule for when the deep layers run: once a sequence has waited `patience` calls (0: at
    once), once `idle` sequences cannot be fed, or once no sequence can be fed.

    Over long runs a deadline alone is within 5% of the best.

    Raises:
        InputError: a patience below 0, or less than one idle sequence.
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
        """Return the usual schedule for so many slots, each of one sequence."""
        return cls(idle=max(1, slots // 2))

    def next_call(self, load: Load) -> Call:
        """Return the next call, to feed or to run deep layers, for at least one sequence."""
        waited = load.oldest >= self.patience and (load.waits or load.oldest > 0)
        return "deep" if waited or load.idle >= self.idle or not load.ready else "feed"


AT_ONCE = Schedule(0, 1)
"""The deep layers run as soon as a sequence waits."""


def due(rows: Many[Sequence], longest: int | None) -> list[Sequence]:
    """Return the sequences of a deep call: those that wait. If some sequence has `longest` columns
    pending, also all with at least half as many."""
    if longest is None:
        return [row for row in rows if row.waits]
    full = any([row.pending(1) >= longest for row in rows])
    half = max(1, longest // 2)
    return [row for row in rows if row.waits or (full and row.pending(1) >= half)]


@dataclass
class Tally:
    """Counts of what the exits did. exited, waited: tokens that left at the first exit, and that
    did not. drafted, accepted: tokens of lossless rounds."""

    exited: int = 0
    waited: int = 0
    drafted: int = 0
    accepted: int = 0
