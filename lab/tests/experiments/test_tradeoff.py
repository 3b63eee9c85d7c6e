"""Laws of speed at equal quality: a mixture of points, and the curve that is drawn of it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from offramp_lab.experiments.comparison import tradeoff
from offramp_lab.experiments.comparison.tradeoff import speed_at


def point(drop: float, speed: float) -> dict[str, Any]:
    return {
        "seed": 0,
        "objective": "free",
        "policy": "max_probability",
        "depths": [2],
        "quality_drop": drop,
        "speedup_decode": speed,
    }


def test_speed_at_a_quality_is_that_of_the_best_mixture() -> None:
    curve = [point(0.0, 1.25), point(0.04, 2.5)]
    assert speed_at(curve, 0.0) == pytest.approx(1.25)
    assert speed_at(curve, 0.04) == speed_at(curve, 1.0) == pytest.approx(2.5)
    assert speed_at(curve, 0.02) == pytest.approx(1 / (0.5 / 1.25 + 0.5 / 2.5))
    # a slower and worse point is no help, and the full model is always there
    assert speed_at([*curve, point(0.03, 1.1)], 0.02) == speed_at(curve, 0.02)
    assert speed_at([point(0.5, 0.8)], 0.1) == speed_at([], 0.1) == 1
    assert speed_at([point(0.1, 2.0)], 0.05) == pytest.approx(1 / 0.75)


def test_a_better_answer_than_the_full_models_is_no_drop() -> None:
    assert speed_at([point(-0.01, 2.0)], 0.0) == pytest.approx(2.0)


def test_more_drop_is_never_slower() -> None:
    draw = random.Random(0)
    curve = [point(draw.uniform(-0.02, 0.2), draw.uniform(0.5, 3)) for _ in range(12)]
    speeds = [speed_at(curve, level / 200) for level in range(40)]
    assert speeds == sorted(speeds)


def test_a_plotted_curve_is_the_speed_at_each_drop_and_ends_at_the_fastest() -> None:
    points = [point(1 - q, s) for s, q in ((2, 0.95), (1.5, 0.94), (1.2, 1), (3, 0.1))]
    rows = tradeoff.band(points)
    assert rows[0] == (1.0, 1.2, 1.2, 1.2)
    for row in rows:
        assert row.speed == pytest.approx(speed_at(points, 1 - row.quality))
    fast = tradeoff.band([point(0.02, 2.0)])
    assert fast[-1].speed == 2.0 and fast[-1].quality == pytest.approx(0.98, abs=0.003)


def test_a_band_spans_the_seeds_around_their_mean() -> None:
    seeds = [{**point(0.0, speed), "seed": seed} for seed, speed in enumerate((2.0, 4.0))]
    (row,) = tradeoff.band(seeds)
    assert row == (1.0, pytest.approx(8 / 3), 2.0, 4.0)
