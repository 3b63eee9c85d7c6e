"""Quality against speed, from points that were measured: a line for each method, over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import harmonic_mean
from typing import Any

import numpy as np

from offramp_lab.experiments.drawing import Band

Points = Sequence[Mapping[str, Any]]
"""Each with `seed`, `quality_drop` against the full model, and `speedup_decode`."""
FREE = "free"
"""The objective that all else is held against."""
WORST = 0.08
"""Plots show drops of quality up to this one."""
_DROPS = tuple(float(drop) for drop in np.linspace(0.0, WORST, 33))
MOST = 6
"""Lines that a plot can show without becoming a tangle."""
SHOWN = (
    "free",
    "max_probability",
    "distillation",
    "cross_entropy",
    "cross_entropy_few",
    "patience",
    "saturation",
    "logit_lens",
    "agreement",
)
"""Names that a plot with too many curves keeps first."""


def speed_at(points: Points, drop: float) -> float:
    """The fastest decoding of a curve, against the full model, at a relative quality drop.

    Between two points, and between a point and the full model (drop 0, speed 1), drop and time are
    interpolated linearly: choosing one of the two at random for each answer gives that in the mean.
    """
    curve = [(0.0, 1.0), *((p["quality_drop"], 1 / p["speedup_decode"]) for p in points)]
    good = [(d, t) for d, t in curve if d <= drop]
    bad = [(d, t) for d, t in curve if d > drop]
    mixed = [t + (s - t) * (drop - d) / (e - d) for d, t in good for e, s in bad]
    return float(1 / min([*mixed, *(t for _, t in good)]))


def of_seed(seed: int, points: Points) -> list[Mapping[str, Any]]:
    return [p for p in points if p["seed"] == seed]


def by_name(points: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, list[Band]]:
    """Curves of named points, at most `MOST`: those of `SHOWN` first, then in the order given."""
    named: dict[str, list[Mapping[str, Any]]] = {}
    for name, point in points:
        named.setdefault(name, []).append(point)
    first = [name for name in SHOWN if name in named]
    names = [*first, *(name for name in named if name not in first)][:MOST]
    return {name: band(named[name]) for name in named if name in names}


def band(points: Points) -> list[Band]:
    """The fastest decoding at each drop of quality: mean over the seeds, and their range.

    As `speed_at` has it, so between measured points too; it ends where a larger drop no longer
    makes anything faster.
    """
    seeds = [of_seed(seed, points) for seed in sorted({p["seed"] for p in points})]
    rows = []
    for drop in _DROPS:
        speeds = [speed_at(curve, drop) for curve in seeds]
        rows.append(Band(1 - drop, harmonic_mean(speeds), min(speeds), max(speeds)))
    fastest = max(row.speed for row in rows)
    ends = next(i for i, row in enumerate(rows) if row.speed >= fastest - 1e-9)
    return rows[: ends + 1]
