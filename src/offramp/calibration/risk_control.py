"""Statistics of a guarantee: tests and bounds for the mean of bounded losses, walks along a path.

A path is a sequence of settings, the safest first; `losses` [n, K] holds what each of n images
loses at each of its K points, or is the `Draws` that says so of answers. "The risk" is a mean loss
over all images, or all answers, to come. Losses are at most 1; those below 0 are gains. Images
count as independent draws, in an order that does not depend on what they lose
(`offramp.calibration.attempts`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, islice
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.calibration.attempts import Draws
from offramp.core.errors import InputError, did_you_mean
from offramp.promises.betting import (
    FRACTIONS,
    PLANNED_FOR,
    SHARES,
    betting_p_value,
    planned_p_value,
)

Array = npt.NDArray[Any]
Losses = Array | Draws | Sequence[Draws]
"""Of several kinds of prompts, what each loses: a test is passed where each passes it, and its
p-value is the largest (an intersection-union test; Berger 1982)."""

PLANNED = 0.85
"""Share of the level at which `sharp` tests the file as it is at the first look, by a test of a
known number of images; the bets, which go on where images are added, have the rest. With so much,
0.85, an exact binomial test needs at most 5% more images than with all of the level; with a half
it needed 16 to 26% more.
"""


def hoeffding_bentkus(risk: float, n: int, target: float) -> float:
    """Return the p-value of "the true risk is above `target`" for a mean `risk` of n losses in [0,
    1].

    The smaller of Hoeffding's and Bentkus's bounds (Bates et al. 2021, section 3.1).
    """
    from scipy.stats import binom

    if risk >= target:
        return 1.0
    divergence = (1 - risk) * math.log((1 - risk) / (1 - target))
    if risk > 0:
        divergence += risk * math.log(risk / target)
    # Rounded, because 3 / 1200 * 1200 is a little more than 3.
    bentkus = math.e * float(binom.cdf(math.ceil(round(n * risk, 6)), n, target))
    return min(1.0, math.exp(-n * divergence), bentkus)


def binomial(losses: Array, target: float) -> float:
    """Return the p-value of "the true risk is above `target`", exact for losses of 0 and 1.

    A loss in between is rounded to 1 in proportion and to 0 elsewhere, so that the mean becomes no
    lower. With unequal chances small sums are no likelier than with equal ones of the same mean
    (Hoeffding 1956). Gains count as 0. Valid for a number of images that was fixed before any was
    seen.
    """
    from scipy.stats import binom

    reached = np.random.default_rng(0).permutation(len(losses)) / max(1, len(losses))
    return float(binom.cdf(int((losses > reached).sum()), len(losses), target))


def _sharp(losses: Array | Draws, target: float, level: float = PLANNED_FOR) -> float:
    """The planned test of the first look and bets on all images, each at its share of the level
    (Bonferroni)."""
    draws = _draws(losses)
    aimed = partial(planned_p_value, level=PLANNED * level, chance=draws.chance)
    first = _largest(draws.first(draws.looked), target, binomial if draws.whole else aimed)
    return min(1.0, first / PLANNED, _bets(draws, target, level) / (1 - PLANNED))


def _bets(losses: Array | Draws, target: float, level: float = PLANNED_FOR) -> float:
    return _largest(_draws(losses), target, betting_p_value)


def _counted(losses: Array | Draws, target: float, level: float = PLANNED_FOR) -> float:
    """A test of the mean loss, gains taken as 0."""

    def test(values: Array, target: float) -> float:
        return hoeffding_bentkus(float(np.maximum(values, 0.0).mean()), len(values), target)

    return _largest(_draws(losses), target, test)


def _largest(draws: Draws, target: float, test: Callable[[Array, float], float]) -> float:
    """The p-value of a test that passes where all lists of values pass; see `Draws.values`."""
    return max(test(part, target) for part in draws.values(target))


TESTS: dict[str, Callable[..., float]] = {
    "sharp": _sharp,
    "upper_bound": _bets,
    "learn_then_test": _counted,
}
"""P-values of losses, a target and the level that stakes aim at, by method. The last one, and the
binomial part of the first, take gains as 0."""
ANY_TIME = ("sharp", "upper_bound")
"""Methods whose p-value stays valid when more images are drawn after a look at it."""
METHODS = ("auto", *TESTS)


def p_value(losses: Losses, target: float, method: str, level: float = PLANNED_FOR) -> float:
    """Return the p-value of "the true risk is above `target`", for losses [n]. `Draws` with `times`
    are tested against `times` the target. level: of the following test, at which stakes aim; the
    p-value is valid at any level."""
    parts = [(part, part.times * target) for part in _parts(losses)]
    return max(TESTS[method](part, own, level) if own < 1 else 0.0 for part, own in parts)


def _parts(losses: Losses) -> list[Draws]:
    one = isinstance(losses, Draws | np.ndarray)
    return [_draws(losses)] if one else list(losses)  # type: ignore[arg-type]


def _draws(losses: Array | Draws) -> Draws:
    return losses if isinstance(losses, Draws) else Draws.of(losses)


def upper_bound(losses: Losses, confidence: float, method: str = "upper_bound") -> float:
    """Return an upper bound of the risk: the smallest target in [mean, 1] that losses [n] pass at
    `confidence`."""
    draws, test = _parts(losses), first_test(method)
    low, high = highest_risk(draws), 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        if p_value(draws, middle, test, 1 - confidence) <= 1 - confidence:
            high = middle
        else:
            low = middle
    return high


def highest_risk(draws: Sequence[Draws]) -> float:
    """Return the largest mean loss of several `Draws`, each divided by its `times`."""
    return max(float(part.risk) / part.times for part in draws)


def walk(losses: Losses, target: float, confidence: float, method: str) -> int | None:
    """Return the index of the last point before the first failed test; None where the first fails.

    "learn_then_test": by Hoeffding-Bentkus (Angelopoulos et al. 2021); gains count as 0, which
    makes the guarantee stricter than asked. "upper_bound": by bets (Jazbec et al. 2024); gains
    count, so it can profit from overthinking.
    """
    draws, passed = _parts(losses), None
    for point in range(draws[0].sums.shape[1]):
        columns = [part.column(point) for part in draws]
        if p_value(columns, target, method, 1 - confidence) > 1 - confidence:
            break
        passed = point
    return passed


def monotone(losses: Losses, level: float = 0.05, low: float = 0.0) -> bool:
    """Return True if nothing contradicts a risk that never falls along the path.

    Betting tests of "no lower than before" on the paired differences of all pairs of points,
    Bonferroni-corrected: a monotone path is called otherwise with probability <= `level`.

    low: the smallest possible loss, 0 or -1.
    """
    kinds = _parts(losses)
    if len(kinds) > 1:
        return all(monotone(part, level / len(kinds), low) for part in kinds)
    [draws] = kinds
    pairs = list(combinations(range(draws.sums.shape[1]), 2))
    means = draws.sums.mean(0)

    def falls(before: int, after: int) -> bool:
        parts = draws.differences(after, before)
        return max(betting_p_value(part, 0.0, 1 - low) for part in parts) <= level / len(pairs)

    return not any(falls(before, after) for before, after in pairs if means[after] < means[before])


@dataclass(frozen=True)
class Decision:
    """The index of the last point of a path that keeps the risk (None: none does), with the
    method."""

    index: int | None
    method: str
    monotone: bool


def control(
    losses: Losses, target: float, confidence: float, method: str = "auto", low: float = 0.0
) -> Decision:
    """Choose a point of the path so that P(risk <= target) >= confidence.

    "auto" walks by the test `sharp`; where the risk is not monotone it falls back on
    `learn_then_test`. On a finite path both walks are fixed-sequence tests and hold for any risk.
    With a monotone risk every safer setting keeps the risk too, also between the points. As the
    choice of method sees the data, the fall-back returns the safer of both walks' points: that is
    wrong only where the first walk passed a wrong point, with probability <= 1 - confidence.

    Raises:
        InputError: an unknown method.
    """
    first_test(method)
    steady = monotone(losses, 1 - confidence, low)
    if method != "auto":
        return Decision(walk(losses, target, confidence, method), method, steady)
    index = walk(losses, target, confidence, "sharp")
    if steady:
        return Decision(index, "sharp", True)
    other = walk(losses, target, confidence, "learn_then_test")
    safer = None if index is None or other is None else min(index, other)
    return Decision(safer, "learn_then_test", False)


def samples_needed(
    target: float, confidence: float, method: str = "auto", risk: float = 0.0
) -> int | None:
    """Return the fewest images that would guarantee `target` at a measured `risk`; None: no number.

    For losses of 0 and 1. Exact at a risk of 0. For "sharp" and "auto", the number at a first look.
    """
    if risk >= target:
        return None
    risk = max(risk, 0.0)
    test = first_test(method)
    if test == "learn_then_test":

        def passes(n: int) -> bool:
            return hoeffding_bentkus(risk, n, target) <= 1 - confidence
    elif test == "sharp":
        from scipy.stats import binom

        def passes(n: int) -> bool:
            found = binom.cdf(math.ceil(round(n * risk, 6)), n, target)
            return bool(found <= PLANNED * (1 - confidence))
    else:
        stakes = FRACTIONS / (1 - target)
        growth = (1 - risk) * np.log1p(stakes * target) + risk * np.log1p(-FRACTIONS)

        def passes(n: int) -> bool:
            return bool(np.logaddexp.reduce(n * growth + SHARES) >= -math.log(1 - confidence))

    return _least(passes)


def _least(passes: Callable[[int], bool]) -> int | None:
    """The least number from 1 that passes, as all beyond it do; None: none does."""
    most = 1
    while not passes(most):
        most *= 2
        if most > 1 << 40:
            return None
    least = most // 2
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if passes(middle) else (middle, most)
    return most


def draws_needed(losses: Losses, target: float, confidence: float, method: str) -> int | None:
    """Return the fewest draws that guarantee `target` at a first look if no answer loses anything,
    for draws with numbers of answers and images like `losses`; for several kinds, in the kind with
    fewest draws.

    n losses of 0 or 1 have (1 - target)^n as their exact p-value. A bet of stake s on draws of c of
    at most L images gains log(1 + s target c / L) each, so unequal draws need about L / mean(c)
    times as many.
    """
    parts, test = _parts(losses), first_test(method)
    fewest = min(len(part.counts) for part in parts)

    def nothing(part: Draws, n: int) -> Draws:
        counts = np.resize(part.counts, math.ceil(n * len(part.counts) / fewest))
        clusters = np.arange(len(counts))
        return replace(
            part,
            sums=np.zeros(len(counts)),
            counts=counts,
            clusters=clusters,
            looked=None,
            chance=1.0,
        )

    def passes(n: int) -> bool:
        draws, level = [nothing(part, n) for part in parts], 1 - confidence
        return p_value(draws, target, test, level) <= level

    return _least(passes)


def more_needed(target: float, confidence: float, risk: float) -> int | None:
    """Return the fewest images, with those of the first look, at which the bets of `sharp`
    guarantee `target` if images are added at a measured `risk`; None: no number."""
    return samples_needed(target, 1 - (1 - PLANNED) * (1 - confidence), "upper_bound", risk)


def images_for(target: float, confidence: float, risk: float, share: float = PLANNED) -> int | None:
    """Return the fewest images for which a first look passes four times in five, if the true risk
    is `risk`, for losses of 0 and 1; None: no number.

    share: of the level, for the exact test; 1: the whole level, as if no image were ever added.
    """
    if risk >= target:
        return None
    level = share * (1 - confidence)
    sizes = _sizes(max(1, math.ceil(math.log(level) / math.log1p(-target)) - 1))
    while True:  # the power is not monotone in n, by a few images
        some = np.fromiter(islice(sizes, 256), int)
        enough = power(some, target, risk, level) >= 0.8
        if enough.any():
            return int(some[enough.argmax()])


def _sizes(n: int) -> Iterator[int]:
    """Numbers of images from n on, a four-hundredth apart."""
    step = 1
    while True:
        yield n
        n, step = n + step, max(1, n // 400)


def power(n: Array | int, target: float, risk: float, level: float) -> Array:
    """The chance that n images with losses of 0 and 1, of mean `risk`, pass an exact binomial test
    of this level."""
    from scipy.stats import binom

    allowed = binom.ppf(level, n, target)  # least count that may be too many
    allowed = allowed - (binom.cdf(allowed, n, target) > level)
    return np.asarray(binom.cdf(allowed, n, risk))


def first_test(method: str) -> str:
    """Return the test that a method begins with. Raise `InputError` for an unknown method."""
    if method not in METHODS:
        raise InputError(f"Method {method!r} is not known.", did_you_mean(method, METHODS))
    return "sharp" if method == "auto" else method
