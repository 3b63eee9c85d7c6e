"""Bets against a claim about a mean: how fast they gain shows how wrong the claim is.

Waudby-Smith and Ramdas (2024): who bets at every draw that bounded losses have a mean on one side
of a claim cannot expect to gain where the claim is true, so by Ville's inequality a fortune that
ever grew c-fold has p = 1/c, however often, and however long, one looks. The claim need only hold
for the mean of each draw given those before.
"""

from __future__ import annotations

import math
from collections import OrderedDict
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
CUED = 0.5
"""Share of the fortune that is kept for starts on a cue: a risk that seems to rise. While the
promise holds with room to spare hardly any comes, so that nearly all of this is there when it is
needed. What is staked may depend on all that was seen before."""
CUE_RATIO, CUE = 3.0, 3.0
"""A cue: a cumulative sum (Page 1954) of the logarithm of how much likelier losses are at so many
times the claimed mean reaches `CUE`."""
PLANNED_FOR, BEFORE, MOST = 0.03, 3, 0.95
"""Of `planned_p_value`: the level that its stakes aim at where none is given, draws that count as
seen, and the largest part of a bet that cannot ruin."""
CLAIMS = np.geomspace(2e-5, 0.98, 160)
"""Means among which a confidence interval is looked for."""


def betting_p_values(losses: Array, target: float, high: float = 1.0) -> Array:
    """Return p-values [...] of "the true risk is above `target`" for losses [n, ...] of at most
    `high`.

    The fortune is split over bets that are `FRACTIONS` of the largest bet without ruin, 1 / (high -
    target). Losses may be negative without a limit. The bets are made in the order of the losses: a
    longer list continues them.
    """
    if target >= high:
        return np.zeros(losses.shape[1:])
    gains = (target - losses[..., None]) * FRACTIONS / (high - target)
    fortune = np.logaddexp.reduce(np.log1p(gains).cumsum(0) + SHARES, axis=-1)
    return np.asarray(np.exp(-np.maximum(fortune.max(0, initial=0.0), 0.0)))


def betting_p_value(losses: Array, target: float, high: float = 1.0) -> float:
    """Return the p-value of `betting_p_values` for losses [n]."""
    return float(betting_p_values(losses, target, high))


def planned_p_value(
    losses: Array, target: float, level: float = PLANNED_FOR, chance: float = 1.0
) -> float:
    """Return the p-value of "the true risk is above `target`" for losses [n] of at most 1, with n
    fixed before any loss was seen.

    One bet, whose stakes aim at the level with the remaining draws (STaR bets, arXiv 2505.22422):
    sqrt(2 (log(1 / level) - log wealth) / (draws left * variance)) by the variance so far. At
    first, losses as scattered as those of 0 and 1 at the target count like `BEFORE` draws. chance:
    in (0, 1], drawn beforehand: at the end this part of the level's wealth is enough (Ramdas and
    Manole 2023).
    """
    n = len(losses)
    if n == 0 or target >= 1:
        return float(n == 0)
    goal, wealth, most, total, squares = -math.log(level), 0.0, 0.0, 0.0, 0.0
    for seen, loss in enumerate(losses.tolist()):
        if wealth >= goal:
            break
        variance = (BEFORE * target * (1 - target) + squares) / (BEFORE + seen)
        stake = math.sqrt(2 * (goal - wealth) / ((n - seen) * variance))
        wealth += math.log1p(min(stake, MOST / (1 - target)) * (target - loss))
        most = max(most, wealth)
        total += loss
        squares += (loss - (target + total) / (seen + 2)) ** 2
    # A fortune that is all but lost would overflow: its p-value is 1 long before.
    return min(1.0, math.exp(-most), chance * math.exp(-max(wealth, -700.0)))


def stakes_above(claims: Array) -> Array:
    """Return the stakes [..., K] of bets that losses in [0, 1] have a mean above each of `claims`
    [...].

    Each stake gains fastest for losses of 0 and 1 with a mean of one of `RATIOS` times the claim
    (Kelly 1956): (p - q) / (q (1 - q)).
    """
    q = np.asarray(claims, dtype=float)[..., None]
    p = np.minimum(q * RATIOS, q + 0.9 * (1 - q))  # no bet may ruin
    return np.asarray((p - q) / (q * (1 - q)))


def as_share(loss: Any, most: float) -> Any:
    """Return losses in [-most, most], where negative ones are gains, as shares in [0, 1] for
    betting."""
    return (loss + most) / (2 * most)


def stake_of(start: int) -> float:
    """Return the share of the fortune for the bets of start number j, from 1: 0.47 / ((j + 1) log(j
    + 1)^2). The shares sum to less than 1 and fall about as slowly as they can."""
    return float(0.47 / ((start + 1) * np.log(start + 1) ** 2))


class Restarts:
    """Bets that the risk is above `promised`, started anew every `EVERY` draws and on a cue.

    A mixture over starts, as for changes of unknown time (Shin, Ramdas and Rinaldo 2023), but with
    shares that sum to 1: its expected gain is at most 0 while the promise holds, so an alarm at a
    fortune of 1 / level is false with probability at most `level`, over unlimited time. The shares
    of later starts are kept. Takes constant time and memory a draw.

    shape: of streams that are watched side by side. starts: number of starts of the first stream.
    """

    def __init__(self, promised: float, shape: tuple[int, ...] = ()) -> None:
        self.promised: float = promised
        self.n: int = 0
        self.stakes: Array = stakes_above(np.array(promised))
        self.fortune: Array = np.zeros((*shape, len(RATIOS)))
        self.kept: float = 1 - CUED
        self.for_cues: Array = np.full(shape, CUED)
        self.cues: Array = np.zeros(shape)
        self.sum: Array = np.zeros(shape)
        self.most: Array = np.ones(shape)
        likelier = min(promised * CUE_RATIO, (1 + promised) / 2)
        self._steps = np.log([(1 - likelier) / (1 - promised), likelier / promised])

    def start(self) -> bool:
        """Start new bets before a draw, if it is time. Return True if some started."""
        started = False
        if self.n % EVERY == 0:
            by_clock = (1 - CUED) * stake_of(self.n // EVERY + 1)
            self.fortune = self.fortune + by_clock / len(RATIOS)
            self.kept -= by_clock
            started = True
        cued = self.sum >= CUE
        if np.any(cued):
            self.cues = self.cues + cued
            at = np.maximum(self.cues, 1)
            share = np.where(cued, CUED / (at * (at + 1)), 0.0)
            self.fortune = self.fortune + share[..., None] / len(RATIOS)
            self.for_cues, self.sum = self.for_cues - share, np.where(cued, 0.0, self.sum)
            started = True
        return started

    def add(self, losses: Any, gains: Array | None = None) -> None:
        """Bet on one more draw of each stream. gains: factors of the bets' fortunes; None: by the
        losses."""
        losses = np.asarray(losses, dtype=float)
        if gains is None:
            self.start()
            gains = 1 + self.stakes * (losses[..., None] - self.promised)
        self.n += 1
        # A fortune of 1e300 has long raised the alarm.
        self.fortune = np.minimum(self.fortune * gains, 1e300)
        self.sum = np.maximum(0.0, self.sum + self._steps[0] + losses * np.ptp(self._steps))
        kept = max(self.kept, 0.0) + np.maximum(self.for_cues, 0.0)
        self.most = np.maximum(self.most, self.fortune.sum(-1) + kept)


@dataclass
class RunningRisk:
    """A watched risk: a test and an interval of the mean of losses in [0, 1] that come one by one.

    promised: the tested claim "the risk is at most this"; None: no test. The claim is true if each
    draw's risk, given those before, is at most that. level: probability, at most, that a true claim
    is ever called broken. confidence: of the interval for a constant risk, at all times together.
    of_one: draws that may be of one image, whose losses form one bet, because later losses of an
    image are no news. most: the largest loss, above 1 where losses are divided by the chances of
    their draws. Takes constant time.
    """

    promised: float | None
    level: float = 0.01
    confidence: float = 0.95
    of_one: int = 1
    most: float = 1.0

    def __post_init__(self) -> None:
        self.n, self.total = 0, 0.0
        self._open: dict[str, tuple[int, float]] = {}
        self._shut: OrderedDict[str, None] = OrderedDict()
        self._bets = None if self.promised is None else Restarts(self.promised)
        self._claims = CLAIMS
        self._above = stakes_above(self._claims)
        self._below = FRACTIONS / (self.most - self._claims[:, None])
        self._up = np.full(self._above.shape, -np.log(len(RATIOS)))
        self._down = np.repeat(SHARES[None], len(self._claims), 0)
        self._most_up = np.zeros(len(self._claims))
        self._most_down = np.zeros(len(self._claims))

    def add(self, loss: float, image: str = "") -> bool:
        """Add the loss of one more draw; return whether it counts.

        image: a name of the draw's image; "": an image of its own. An image counts `of_one` times,
        and no more once bets have started anew since its first time.

        Raises:
            ValueError: the loss is not in [0, most].
        """
        if not 0.0 <= loss <= self.most:
            raise ValueError(f"a loss of {loss} is not in [0, {self.most:g}]")
        if self._bets is not None and self._bets.start():
            self._shut.update(dict.fromkeys(self._open))
            self._open = {}
            while len(self._shut) > REMEMBERED:
                self._shut.popitem(last=False)
        draws, lost = self._open.get(image, (0, 0.0)) if image else (0, 0.0)
        if image and (image in self._shut or draws >= self.of_one):
            return False
        before, after = (draws, lost), (draws + 1, lost + loss)
        if image:
            self._open[image] = after
        self.n += 1
        self.total += loss
        if self._bets is not None:
            self._bets.add(
                loss, self._gained(self._bets.stakes, self._bets.promised, before, after)
            )
        claims = self._claims[:, None]
        self._up += np.log(self._gained(self._above, claims, before, after))
        self._down += np.log(self._gained(-self._below, claims, before, after))
        np.maximum(self._most_up, np.logaddexp.reduce(self._up, -1), out=self._most_up)
        np.maximum(self._most_down, np.logaddexp.reduce(self._down, -1), out=self._most_down)
        return True

    def _gained(
        self, stakes: Array, claim: Any, before: tuple[int, float], after: tuple[int, float]
    ) -> Array:
        """Return the factor by which one more draw of an image changes its bets.

        before, after: number of draws of the image, and the sum of their losses.
        """
        then, now = (1 + stakes * (lost - n * claim) / self.of_one for n, lost in (before, after))
        return np.asarray(now / then)

    def extend(self, losses: Sequence[float]) -> None:
        """Add several losses, each of an image of its own."""
        for loss in losses:
            self.add(loss)

    @property
    def mean(self) -> float | None:
        """Return the mean loss so far; above 1 is possible for losses divided by chances."""
        return min(1.0, self.total / self.n) if self.n else None

    @property
    def p_value(self) -> float:
        """Return the p-value, valid at any time, of the claim that the risk is at most the promised
        one."""
        return 1.0 if self._bets is None else float(1 / self._bets.most)

    @property
    def broken(self) -> bool:
        """Return True if the promise was ever shown to be broken."""
        return self.promised is not None and self.p_value <= self.level

    @property
    def interval(self) -> tuple[float, float]:
        """Return the confidence interval of the risk, valid at all times together and two-sided."""
        enough = -np.log((1 - self.confidence) / 2)
        low = self._claims[self._most_up >= enough]
        high = self._claims[self._most_down >= enough]
        return float(low.max(initial=0.0)), float(high.min(initial=1.0))

    # -- kept over a restart -----------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Return the whole state as JSON."""
        bets = self._bets
        kept = None if bets is None else {name: _plain(getattr(bets, name)) for name in KEPT}
        sides = (self._up, self._down, self._most_up, self._most_down)
        return {
            "promised": self.promised,
            "level": self.level,
            "confidence": self.confidence,
            "of_one": self.of_one,
            "most": self.most,
            "n": self.n,
            "total": self.total,
            "bets": kept,
            "sides": [side.tolist() for side in sides],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RunningRisk:
        """Return the risk that `to_json` wrote. Raise KeyError, TypeError or ValueError for
        anything else."""
        names = ("promised", "level", "confidence", "of_one")
        found = cls(**{name: value[name] for name in names}, most=value.get("most", 1.0))
        found.n, found.total = int(value["n"]), _finite(value["total"], ()).item()
        now = (found._up, found._down, found._most_up, found._most_down)
        sides = [_finite(s, a.shape) for s, a in zip(value["sides"], now, strict=True)]
        found._up, found._down, found._most_up, found._most_down = sides
        bets = found._bets
        if (bets is None) != (value["bets"] is None):
            raise ValueError("bets without a promise")
        for name in KEPT if bets is not None else ():
            kept = _finite(value["bets"][name], np.shape(getattr(bets, name)))
            setattr(bets, name, int(kept) if name == "n" else kept)
        return found


KEPT = ("n", "kept", "for_cues", "cues", "sum", "fortune", "most")
"""What is kept of `Restarts`."""
REMEMBERED = 100_000
"""Images that are known to have counted before bets started anew."""


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _finite(value: Any, shape: tuple[int, ...]) -> Array:
    """Raise ValueError or TypeError for anything but finite numbers, of a shape."""
    found = np.array(value, dtype=float)
    if found.shape != shape or not np.isfinite(found).all():
        raise ValueError("numbers of another shape, or none")
    return found
