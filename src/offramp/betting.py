"""Bets against a claim about a mean: how fast they gain shows how wrong the claim is.

Waudby-Smith and Ramdas (2024): who bets at every draw that bounded losses have a mean on one side
of a claim cannot expect to gain where the claim is true, so by Ville's inequality a fortune that
ever grew c-fold has p = 1/c, however often, and however long, one looks. The claim need only hold
for the mean of each draw given those before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

FRACTIONS = np.array([0.1, 0.3, 0.6, 0.9])
"""What part of the largest allowed bet is staked on a mean below the claimed one; rare losses want
much, noisy ones little."""
SHARES = np.log(FRACTIONS / FRACTIONS.sum())
"""Logarithms of the shares of the fortune behind each; rare losses are the usual case."""
RATIOS = np.array([1.3, 1.6, 2.0, 3.0, 5.0, 10.0, 30.0])
"""How many times the claimed mean a bet on a larger one is made for; each has the same share."""
CLAIMS = np.geomspace(2e-5, 0.98, 160)
"""Means among which a confidence interval is looked for."""


def betting_p_values(losses: Array, target: float, high: float = 1.0) -> Array:
    """P-values [...] of "the true risk is above `target`" for losses [n, ...] of at most `high`.

    The fortune is split over bets that are `FRACTIONS` of the largest one that cannot ruin,
    1 / (high - target). Losses may be negative without a limit. The bets are made in the order of
    the losses: a longer list continues them.
    """
    if target >= high:
        return np.zeros(losses.shape[1:])
    gains = (target - losses[..., None]) * FRACTIONS / (high - target)
    fortune = np.logaddexp.reduce(np.log1p(gains).cumsum(0) + SHARES, axis=-1)
    return np.asarray(np.exp(-np.maximum(fortune.max(0, initial=0.0), 0.0)))


def betting_p_value(losses: Array, target: float, high: float = 1.0) -> float:
    """The same for losses [n]."""
    return float(betting_p_values(losses, target, high))


def stakes_above(claims: Array) -> Array:
    """Stakes [..., K] of bets that losses in [0, 1] have a mean above each of `claims` [...].

    Those that gain fastest, for losses of 0 and 1, where the mean is one of `RATIOS` times the
    claim (Kelly 1956): (p - q) / (q (1 - q)).
    """
    q = np.asarray(claims, dtype=float)[..., None]
    p = np.minimum(q * RATIOS, q + 0.9 * (1 - q))  # no bet may ruin
    return np.asarray((p - q) / (q * (1 - q)))


def first_alarms(losses: Array, promised: float, level: float) -> Array:
    """At which draw, from 1, "the risk is at most `promised`" is called broken at `level`, in each
    stream of losses [n, ...]; 0: never."""
    stakes = stakes_above(np.array(promised))
    log_fortune = np.log1p(stakes * (losses[..., None] - promised)).cumsum(0)
    fortune = np.logaddexp.reduce(log_fortune, axis=-1) - np.log(len(RATIOS))
    over = fortune >= -np.log(level)
    return np.asarray(np.where(over.any(0), over.argmax(0) + 1, 0))


@dataclass
class RunningRisk:
    """A risk that is watched: what losses in [0, 1] that come one by one say of their mean.

    promised: the claim "the risk is at most this" that is tested; None: none. level: how often, at
    most, a true claim is ever called broken, over unlimited time. confidence: of the interval, at
    all times together. Takes constant memory and time.
    """

    promised: float | None
    level: float = 0.01
    confidence: float = 0.95

    def __post_init__(self) -> None:
        self.n, self.total = 0, 0.0
        promised = () if self.promised is None else (self.promised,)
        self._claims = np.array([*promised, *CLAIMS])
        self._above = stakes_above(self._claims)
        self._below = FRACTIONS / (1 - self._claims[:, None])
        self._up = np.full(self._above.shape, -np.log(len(RATIOS)))
        self._down = np.repeat(SHARES[None], len(self._claims), 0)
        self._most_up = np.zeros(len(self._claims))
        self._most_down = np.zeros(len(self._claims))

    def add(self, loss: float) -> None:
        """Note what one more draw lost.

        Raises:
            ValueError: the loss is not in [0, 1].
        """
        if not 0.0 <= loss <= 1.0:
            raise ValueError(f"a loss of {loss} is not in [0, 1]")
        self.n += 1
        self.total += loss
        distance = loss - self._claims[:, None]
        self._up += np.log1p(self._above * distance)
        self._down += np.log1p(-self._below * distance)
        np.maximum(self._most_up, np.logaddexp.reduce(self._up, -1), out=self._most_up)
        np.maximum(self._most_down, np.logaddexp.reduce(self._down, -1), out=self._most_down)

    def extend(self, losses: Sequence[float]) -> None:
        """Note several."""
        for loss in losses:
            self.add(loss)

    @property
    def mean(self) -> float | None:
        return self.total / self.n if self.n else None

    @property
    def p_value(self) -> float:
        """Of the claim that the risk is at most what was promised, at any time."""
        return 1.0 if self.promised is None else float(np.exp(-self._most_up[0]))

    @property
    def broken(self) -> bool:
        """Whether the promise is shown to be broken; once it is, for good."""
        return self.promised is not None and self.p_value <= self.level

    @property
    def interval(self) -> tuple[float, float]:
        """What the risk lies in, with the confidence, at all times together; each side has half of
        what may go wrong."""
        enough = -np.log((1 - self.confidence) / 2)
        low = self._claims[self._most_up >= enough]
        high = self._claims[self._most_down >= enough]
        return float(low.max(initial=0.0)), float(high.min(initial=1.0))
