"""Which call comes next.

Where exits are used, shallow and deep calls take turns. The deep layers cost nearly the same over
one token and over many, so they wait for company; but a row that parked idles meanwhile, and what
is built on a guess that is wrong is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from offramp.errors import InputError
from offramp.serving.rows.row import Row

Call = Literal["shallow", "deep", "flush", "step", "full"]
"""flush: a deep call over all that is pending; the others as in `SlotBatch`."""


class Load(NamedTuple):
    """The rows in slots. ready: can be fed. idle: cannot, before a deep call. oldest: shallow calls
    since the oldest question to the deep layers. asks: whether there is any. pending: tokens that
    wait before them."""

    rows: int
    ready: int
    idle: int
    oldest: int
    asks: bool
    pending: int

    @classmethod
    def of(cls, rows: Sequence[Row], longest: int) -> Load:
        """Of at least one row, each with at most `longest` tokens pending."""
        return cls(
            rows=len(rows),
            ready=sum(row.ready(longest) for row in rows),
            idle=sum(row.idle(longest) for row in rows),
            oldest=max(row.waited for row in rows),
            asks=any(row.asks for row in rows),
            pending=sum(row.pending for row in rows),
        )


@dataclass(frozen=True)
class Schedule:
    """When the deep layers run: once the oldest question has waited `patience` shallow calls (0: as
    soon as there is one), once `idle` rows are, or once no row can be fed.

    Defaults are the simulation's over long runs: a deadline alone is within 5% of the best.

    Raises:
        InputError: a patience below 0, no idle row.
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
        """The usual one of so many slots."""
        return cls(idle=max(1, slots // 2))

    def next_call(self, load: Load) -> Call:
        """Shallow or deep, for at least one row."""
        waited = load.oldest >= self.patience and (load.asks or load.oldest > 0)
        return "deep" if waited or load.idle >= self.idle or not load.ready else "shallow"


def due(rows: Sequence[Row], longest: int) -> list[bool]:
    """Which rows a deep call takes: those with a question; and once one has `longest` tokens
    pending, so that it cannot be fed, all that have half as many."""
    full = any(row.pending >= longest for row in rows)
    return [row.asks or (full and row.pending >= max(1, longest // 2)) for row in rows]


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

    def fade(self) -> None:
        """Count what was so far by half from now on."""
        for name in ("exited", "guessed", "parked", "ruled", "right"):
            setattr(self, name, getattr(self, name) / 2)
