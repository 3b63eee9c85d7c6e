"""Speedup at equal quality: how fast each (objective, policy) decodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import harmonic_mean, mean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.evaluation.statistics import Measure, interval
from offramp_lab.experiments.comparison.methods import SUPERVISED
from offramp_lab.experiments.comparison.tradeoff import FREE, Points, by_name, of_seed, speed_at
from offramp_lab.experiments.drawing import speed_bands

Array = NDArray[np.float64]
RESAMPLES = 200
LEVELS = (0.005, 0.01, 0.02, 0.05)
"""Relative drops of quality at which speeds are compared."""


@dataclass(frozen=True)
class Samples:
    """What figures are made of, for intervals: qualities of single answers, and single rounds.

    full: qualities of the full model's, one for each test example [N]; early: at each point [P, N].
    groups: a name for each example; those of one image share theirs, and are drawn together.
    full_seconds: of decoding in each round that a point ran in [P, R], by the full
        model; seconds: by the point [P, R].
    """

    full: Array
    early: Array
    groups: Sequence[str]
    full_seconds: Array
    seconds: Array

    def interval(self, figure: Callable[[Array, Array], float]) -> list[float]:
        """The bootstrap's 95%, over images and rounds, of what is a figure of the points'
        relative drops of quality [P] and their speeds [P]."""
        rounds = self.seconds.shape[1]
        draw = np.random.default_rng(0)

        def of(sums: Array) -> Array:
            full, early = sums[:, :1], sums[:, 1:]
            drops = (full - early) / np.maximum(full, 1e-9)
            speeds = map(self._speeds, draw.integers(rounds, size=(len(drops), rounds)))
            return np.array([figure(*both) for both in zip(drops, speeds, strict=True)])

        rows = np.column_stack([self.full, self.early.T])
        ends = interval(Measure(0.0, rows, of), self.groups, resamples=RESAMPLES)
        if ends is None:  # a single image
            drops = 1 - self.early.sum(1) / max(self.full.sum(), 1e-9)
            ends = (figure(drops, self._speeds(np.arange(rounds))),) * 2
        return list(ends)

    def _speeds(self, rounds: NDArray[np.int64]) -> Array:
        """Of every point [P], if these had been all rounds."""
        full, early = (
            np.median(seconds[:, rounds], 1) for seconds in (self.full_seconds, self.seconds)
        )
        return np.asarray(full / early)


def equal_quality(points: Points, samples: Samples | None = None) -> dict[str, Any]:
    """Speeds at equal quality.

    samples: of the same points; None: no intervals.

    Returns:
        `curves`: for each (objective, policy) `speedup_decode`, its `speed_at` each of `LEVELS`,
        by the mean of the seeds' times; `free_over`, by how much FREE with max_probability is
        faster there: an objective is held against FREE's exits at its own depths, a policy and a
        pair against all of them, and cross_entropy, which reads all labels, against the FREE that
        does too;
        `free_over_by_seed`, the same for each seed alone; and with `samples` also
        `free_over_interval`, the bootstrap's 95% over test images and rounds.
    """
    curves = [_curve(*pair) for pair in _pairs(points)]
    if samples is not None:
        for curve, pair in zip(curves, _pairs(points), strict=True):
            curve["free_over_interval"] = {
                str(level): samples.interval(partial(_over, points, pair, level))
                for level in LEVELS
            }
    return {"curves": curves}


def _pairs(points: Points) -> list[tuple[Points, Points]]:
    """Each curve's points, and those of FREE that it is held against."""
    curves: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for point in points:
        curves.setdefault((point["objective"], point["policy"]), []).append(point)
    free, supervised = (curves.get((name, "max_probability"), []) for name in (FREE, SUPERVISED))
    pairs: list[tuple[Points, Points]] = []
    for (objective, policy), theirs in sorted(curves.items()):
        depths = [p["depths"] for p in theirs]
        ours = supervised if objective == "cross_entropy" and supervised else free
        alike = [p for p in ours if p["depths"] in depths]
        of_objective = objective != FREE and policy == "max_probability"
        pairs.append((theirs, alike if of_objective else ours))
    return pairs


def _curve(theirs: Points, free: Points, levels: Sequence[float] = LEVELS) -> dict[str, Any]:
    """A curve's speeds, and by how much FREE's are higher."""
    seeds = sorted({p["seed"] for p in theirs})
    curve: dict[str, Any] = {name: theirs[0][name] for name in ("objective", "policy")}
    curve |= {"speedup_decode": {}, "free_over": {}, "free_over_by_seed": {}}
    for level in levels:
        speeds = [speed_at(of_seed(seed, theirs), level) for seed in seeds]
        frees = [speed_at(of_seed(seed, free), level) for seed in seeds]
        faster = curve["speedup_decode"][str(level)] = harmonic_mean(speeds)
        curve["free_over"][str(level)] = harmonic_mean(frees) / faster
        curve["free_over_by_seed"][str(level)] = [
            free / speed for free, speed in zip(frees, speeds, strict=True)
        ]
    return curve


def _over(
    points: Points, pair: tuple[Points, Points], level: float, drops: Array, speeds: Array
) -> float:
    """By how much FREE is ahead in a pair, if these were the points' drops and speeds [P]."""
    resampled = {
        id(point): {**point, "quality_drop": float(drop), "speedup_decode": float(speed)}
        for point, drop, speed in zip(points, drops, speeds, strict=True)
    }
    theirs, free = ([resampled[id(point)] for point in curve] for curve in pair)
    return float(_curve(theirs, free, (level,))["free_over"][str(level)])


def _name(point: Mapping[str, Any]) -> str:
    """Of a point's line: its objective, its policy, or both where neither is FREE's."""
    objective, policy = point["objective"], point["policy"]
    if policy == "max_probability":
        return str(objective)
    return policy if objective == FREE else f"{objective}, {policy}"


def drawn(comparison: Mapping[str, Any]) -> str:
    """The quality that is kept against measured decoding speed, a line for each (objective,
    policy), as SVG; at most `MOST` of them."""
    curves = by_name((_name(point), point) for point in comparison["points"])
    worded = {name.replace("_", " "): curve for name, curve in curves.items()}
    return speed_bands(worded, "quality kept", ours=FREE)


def t_interval(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """Student's 95% interval of the mean of a few values, such as seeds'; (None, None) for a single
    one."""
    from scipy.stats import t as student

    if len(values) < 2:
        return None, None
    tail = float(student.ppf(0.975, len(values) - 1))
    half, middle = tail * stdev(values) / len(values) ** 0.5, mean(values)
    return middle - half, middle + half
