"""Bets against a claim about a mean: how fast they gain shows how wrong the claim is.

Waudby-Smith and Ramdas (2024): who bets at every draw that bounded losses have a mean on one side
of a claim cannot expect to gain where the claim is true, so by Ville's inequality a fortune that
ever grew c-fold has p = 1/c, however often, and however long, one looks. The claim need only hold
for the mean of each draw given those before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
EVERY = 50
"""Draws after which the bets against a promise start anew beside those that run. What was gained or
lost before does not delay them: a risk that rises late is noticed about as soon as one that was
high from the start."""
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


def stake_of(start: int) -> float:
    """The share of the fortune that bets of start number j, from 1, are made with: 1 / (j (j + 1)),
    which sums to 1."""
    return 1 / (start * (start + 1))


class Restarts:
    """Bets that the risk is above `promised`, started anew every `EVERY` draws.

    A mixture over starts, as for changes of unknown time (Shin, Ramdas and Rinaldo 2023), but with
    shares that sum to 1: it cannot expect to gain while the promise holds, so an alarm at a
    fortune of 1 / level is false with probability at most `level`, over unlimited time. What waits
    to be bet is kept. Takes constant time and memory a draw.

    shape: of streams that are watched beside each other.
    """

    def __init__(self, promised: float, shape: tuple[int, ...] = ()) -> None:
        self.promised, self.n = promised, 0
        self.stakes = stakes_above(np.array(promised))
        self.fortune = np.zeros((*shape, len(RATIOS)))
        self.kept = 1.0
        self.most = np.ones(shape)

    def add(self, losses: Any) -> None:
        """One more draw of each stream."""
        if self.n % EVERY == 0:
            share = stake_of(self.n // EVERY + 1)
            self.fortune = self.fortune + share / len(RATIOS)
            self.kept -= share
        self.n += 1
        gains = 1 + self.stakes * (np.asarray(losses)[..., None] - self.promised)
        # A fortune of 1e300 has long raised the alarm.
        self.fortune = np.minimum(self.fortune * gains, 1e300)
        self.most = np.maximum(self.most, self.fortune.sum(-1) + max(self.kept, 0.0))


@dataclass
class RunningRisk:
    """A risk that is watched: what losses in [0, 1] that come one by one say of their mean.

    promised: the claim "the risk is at most this" that is tested; None: none. It is true where the
    risk of each draw, given those before, is at most that. level: how often, at most, a true claim
    is ever called broken, over unlimited time. confidence: of the interval for a risk that stays
    the same, at all times together. Takes constant memory and time.
    """

    promised: float | None
    level: float = 0.01
    confidence: float = 0.95

    def __post_init__(self) -> None:
        self.n, self.total = 0, 0.0
        self._bets = None if self.promised is None else Restarts(self.promised)
        self._claims = CLAIMS
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
        if self._bets is not None:
            self._bets.add(loss)
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
        return 1.0 if self._bets is None else float(1 / self._bets.most)

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

    # -- kept over a restart -----------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """All that was learnt."""
        bets = self._bets
        kept = (
            None if bets is None else [bets.n, bets.kept, bets.fortune.tolist(), float(bets.most)]
        )
        sides = (self._up, self._down, self._most_up, self._most_down)
        return {
            "promised": self.promised, "level": self.level, "confidence": self.confidence,
            "n": self.n, "total": self.total, "bets": kept, "sides": [s.tolist() for s in sides],
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RunningRisk:
        """What `to_json` gave. Raise KeyError, TypeError or ValueError for anything else."""
        found = cls(value["promised"], value["level"], value["confidence"])
        found.n, found.total = int(value["n"]), float(value["total"])
        sides = [np.asarray(side, dtype=float) for side in value["sides"]]
        now = (found._up, found._down, found._most_up, found._most_down)
        if [side.shape for side in sides] != [side.shape for side in now]:
            raise ValueError("bets of another shape")
        found._up, found._down, found._most_up, found._most_down = sides
        if found._bets is not None:
            n, kept, fortune, most = value["bets"]
            if len(fortune) != len(RATIOS):
                raise ValueError("bets of another shape")
            found._bets.n, found._bets.kept = int(n), float(kept)
            found._bets.fortune = np.array(fortune, dtype=float)
            found._bets.most = np.array(most, dtype=float)
        return found
