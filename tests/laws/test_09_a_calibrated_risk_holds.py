"""Law 9: a calibrated risk holds on fresh data at the stated confidence, however the risk runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from risks import (
    COARSE,
    CONFIDENCE,
    DEPTHS,
    LOST,
    TARGET,
    allowed,
    at_target,
    drawn,
    population,
    seconds,
    truth,
)

from offramp.calibration.risk_control import METHODS, TESTS, betting_upper_bound, control
from offramp.calibration.threshold_search import candidates, pareto_path


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", LOST)
def test_a_promise_is_broken_no_more_often_than_stated(method: str, shape: str) -> None:
    draw, trials, broken = np.random.default_rng(0), 400, 0
    for _ in range(trials):
        losses = drawn(draw, shape)
        index = control(losses, TARGET, CONFIDENCE, method, losses.min()).index
        broken += index is not None and truth(shape)[index] > TARGET
    assert broken / trials <= allowed(1 - CONFIDENCE, trials)


@pytest.mark.parametrize("method", TESTS)
@pytest.mark.parametrize("kind", ["0 or 1", "fractions", "gains"])
def test_p_values_are_valid(method: str, kind: str) -> None:
    draw, trials = np.random.default_rng(1), 2000
    p = np.array([TESTS[method](at_target(draw, kind), 0.1) for _ in range(trials)])
    for level in (0.01, 0.05, 0.1, 0.3):
        assert (p <= level).mean() <= allowed(level, trials)


def test_the_betting_bound_covers_the_mean() -> None:
    draw, trials = np.random.default_rng(2), 300
    missed = [betting_upper_bound(at_target(draw, "gains"), 0.1) < 0.1 for _ in range(trials)]
    assert np.mean(missed) <= allowed(0.1, trials)


@pytest.mark.parametrize("method", ["auto", "upper_bound", "learn_then_test"])
def test_a_promise_after_a_search_is_broken_no_more_often_than_stated(method: str) -> None:
    whole, tried = population(), candidates(DEPTHS, COARSE)
    true: Callable[[dict[int, float]], float] = cache_by_value(lambda t: whole.differs(t).mean())
    draw, trials, broken, given = np.random.default_rng(3), 200, 0, 0
    for _ in range(trials):
        search = whole.part(draw.integers(0, len(whole.replay.targets), 120))
        tested = whole.part(draw.integers(0, len(whole.replay.targets), 280))
        path = pareto_path(search, tried, seconds, COARSE)
        losses = np.stack([tested.differs(t) * 1.0 for t in path], 1)
        index = control(losses, 0.04, 0.9, method).index
        given += index is not None
        broken += index is not None and true(path[index]) > 0.04
    assert given > trials / 2
    assert broken / trials <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / trials)


def cache_by_value(function: Callable[[dict[int, float]], float]) -> Any:
    known: dict[Any, float] = {}

    def look(thresholds: dict[int, float]) -> float:
        key = tuple(sorted(thresholds.items()))
        if key not in known:
            known[key] = function(thresholds)
        return known[key]

    return look
