"""Which call comes next: shallow, deep or full.

The deep layers cost nearly the same over one token and over many, so they wait for company; but a
row that parked idles meanwhile, and what is built on a guess that is wrong is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from offramp.errors import InputError
from offramp.serving.rows.row import Row

Call = Literal["shallow", "deep", "full"]


class Load(NamedTuple):
    """The rows in slots. ready: can be fed. idle: cannot, before a deep call. oldest: shallow calls
    since the oldest question to the deep layers. pending: tokens that wait before them. plain: no
    row's tokens may exit, so that all may run at full depth."""

    ready: int
    idle: int
    oldest: int
    pending: int
    plain: bool

    @classmethod
    def of(cls, rows: Sequence[Row], longest: int, *, plain: bool) -> Load:
        """Of at least one row, each with at most `longest` tokens pending."""
        return cls(
            ready=sum(row.ready(longest) for row in rows),
            idle=sum(row.idle(longest) for row in rows),
            oldest=max(row.waited for row in rows),
            pending=sum(row.pending for row in rows),
            plain=plain,
        )


@dataclass(frozen=True)
class Schedule:
    """When the deep layers run: once the oldest question has waited `patience` shallow calls, once
    `idle` rows are, or once no row can be fed.

    Defaults are the simulation's over long runs: a deadline alone is within 5% of the best.

    Raises:
        InputError: a number below 1.
    """

    patience: int = 4
    idle: int = 4

    def __post_init__(self) -> None:
        if self.patience < 1 or self.idle < 1:
            raise InputError(
                f"A schedule of {self.patience} calls and {self.idle} rows never runs.",
                "Give whole numbers from 1.",
            )

    @classmethod
    def of(cls, slots: int) -> Schedule:
        """The usual one of so many slots."""
        return cls(idle=max(1, slots // 2))

    def next_call(self, load: Load, *, full: bool = False) -> Call:
        """The next call for at least one row.

        full: whether rows whose tokens are all the full model's had better run at full depth.
        """
        if full and load.plain:
            return "deep" if load.pending else "full"
        asked = load.oldest >= self.patience or load.idle >= self.idle
        return "deep" if asked or not load.ready else "shallow"


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

    def fade(self) -> None:
        """Count what was so far by half from now on."""
        for name in ("exited", "guessed", "parked", "ruled", "right"):
            setattr(self, name, getattr(self, name) / 2)
