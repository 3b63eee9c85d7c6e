"""One way to measure: methods answer the same inputs in turn, round by round, and what each took
becomes an entry of a record."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from offramp.evaluation.timing import in_turn

Rounds = Sequence[Sequence[Any]]
"""What a method returned, by round and input."""
Rates = NDArray[np.float64]
"""What was done of each of n inputs, and the seconds that took [2, n]."""


@dataclass(frozen=True)
class Experiment:
    """methods: by name, or by a tuple of what sets them apart; each measures itself on an input.

    warm: inputs that all are tried on first, which does not count. title: of the progress bar;
    empty: none.
    """

    methods: Mapping[Any, Callable[[Any], Any]]
    inputs: Sequence[Any] = (None,)
    rounds: int = 1
    warm: int = 0
    title: str = ""

    def run(self) -> dict[Any, list[list[Any]]]:
        """What every method returned, by round and input."""
        return in_turn(
            self.methods,
            self.inputs,
            rounds=self.rounds,
            warm=self.warm,
            progress=bar(self.title) if self.title else iter,
        )


def spent(call: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, float]]:
    """The same method, with the CPU seconds of each call beside what it returns."""

    def run(one: Any) -> tuple[Any, float]:
        begin = time.process_time()
        found = call(one)
        return found, time.process_time() - begin

    return run


def each(rounds: Rounds) -> list[Any]:
    """What a method returned, round after round."""
    return [found for by_input in rounds for found in by_input]


def times(own: Rates, base: Rates, resamples: int = 2000) -> dict[str, float]:
    """How many times as fast as `base` something is, with the 95% interval of a bootstrap over
    inputs, drawn in pairs: times, low, high."""
    draw = np.random.default_rng(0).integers(own.shape[1], size=(resamples, own.shape[1]))
    own_speed, base_speed = (rates[0][draw].sum(1) / rates[1][draw].sum(1) for rates in (own, base))
    low, high = np.quantile(own_speed / base_speed, (0.025, 0.975))
    ratio = (own[0].sum() / own[1].sum()) / (base[0].sum() / base[1].sum())
    return {"times": float(ratio), "low": float(low), "high": float(high)}


def bar(title: str) -> Callable[[Any], Any]:
    """A progress bar around what is gone through, where there is a terminal."""
    return lambda iterable: tqdm(iterable, title, disable=None, leave=False)


def identical(one: Sequence[Any], other: Sequence[Any]) -> NDArray[np.float64]:
    """Which answers [N] have the same tokens, as 1 and 0."""
    ids = ([getattr(answer, "ids", answer) for answer in answers] for answers in (one, other))
    return np.array([float(a == b) for a, b in zip(*ids, strict=True)])


def same(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many answers have the same tokens."""
    return int(identical(one, other).sum())
