"""Sizes of a batch engine."""

from __future__ import annotations

from dataclasses import dataclass

from offramp.core.decoding.scheduler import Schedule
from offramp.core.errors import InputError


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of a batch engine.

    slots: rows written at once. limit: tokens of one row, prompt and answer. budget: prompt tokens
    read in a round, while other rows wait; a longer prompt is read in several rounds, if its family
    allows. longest: tokens of a row that may wait before the deep layers. schedule: when the deep
    layers run; None: the usual one for so many slots.

    Raises:
        InputError: a number below 1.
    """

    slots: int = 8
    limit: int = 1024
    budget: int = 256
    longest: int = 64
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        sizes = {n: getattr(self, n) for n in ("slots", "limit", "budget", "longest")}
        wrong = {n: v for n, v in sizes.items() if type(v) is not int or v < 1}
        if wrong:
            raise InputError(
                f"The engine cannot run with {', '.join(f'{n}={v!r}' for n, v in wrong.items())}.",
                "Give whole numbers from 1.",
            )
