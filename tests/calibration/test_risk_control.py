"""Which points pass, what monotony changes, bounds and needs; that a guarantee holds is law 9."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from risks import CONFIDENCE, TARGET, N, allowed, drawn
from scipy.stats import binom

from offramp.calibration.attempts import Draws, ImageRows, by_image
from offramp.calibration.risk_control import (
    METHODS,
    TESTS,
    control,
    draws_needed,
    hoeffding_bentkus,
    images_for,
    monotone,
    more_needed,
    p_value,
    samples_needed,
    upper_bound,
    walk,
)
from offramp.core.errors import InputError
from offramp.promises.betting import FRACTIONS, SHARES, betting_p_value, planned_p_value

# -- guarantees ---------------------------------------------------------------------------------


def test_a_promise_that_can_be_given_mostly_is() -> None:
    draw = np.random.default_rng(0)
    for method in METHODS:
        losses = (Draws.of(drawn(draw, "monotone"), whole=True) for _ in range(50))
        found = [control(some, TARGET, CONFIDENCE, method) for some in losses]
        assert np.mean([f.index is not None and f.index >= 1 for f in found]) > 0.9


@pytest.mark.parametrize("method", ["learn_then_test", "upper_bound"])
def test_the_last_that_passed_is_returned_not_the_first_that_failed(method: str) -> None:
    losses = np.stack([np.full(1000, loss) for loss in (0.0, 0.0, 1.0, 0.0)], 1)
    assert walk(losses, TARGET, CONFIDENCE, method) == 1


@pytest.mark.parametrize("method", ["learn_then_test", "upper_bound"])
def test_a_path_whose_safest_point_fails_gives_nothing(method: str) -> None:
    losses = np.stack([np.ones(1000), np.zeros(1000)], 1)
    assert walk(losses, TARGET, CONFIDENCE, method) is None


def test_only_the_betting_bound_profits_from_gains() -> None:
    losses = np.zeros((2000, 1))
    losses[:100], losses[100:200] = 1.0, -1.0  # 5% lost, 5% gained
    assert walk(losses, 0.03, CONFIDENCE, "upper_bound") == 0
    assert walk(losses, 0.03, CONFIDENCE, "learn_then_test") is None


def test_an_unknown_method_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="Did you mean 'upper_bound'"):
        control(np.zeros((10, 1)), TARGET, CONFIDENCE, "upper")


# -- monotonicity -----------------------------------------------------------------------------


def test_a_risk_that_never_falls_is_rarely_called_otherwise() -> None:
    draw, trials = np.random.default_rng(1), 300
    flat = [monotone((draw.random((N, 4)) < 0.1) * 1.0, 0.1) for _ in range(trials)]
    assert 1 - np.mean(flat) <= allowed(0.1, trials)


def test_a_deep_dip_is_noticed() -> None:
    assert not monotone(drawn(np.random.default_rng(0), "dip"))


def test_a_dip_far_from_the_one_before_is_noticed() -> None:
    draw = np.random.default_rng(0)
    slopes = draw.random((2000, 1)) < np.array([0.10, 0.095, 0.09, 0.085, 0.08, 0.075])
    assert not monotone(slopes * 1.0)


def test_where_monotonicity_fails_the_safer_of_both_choices_is_taken() -> None:
    losses = drawn(np.random.default_rng(0), "dip", 2000)
    losses[:, 0] = 0.0
    losses[:1900, 2] = -0.5  # gains, which only the betting bound counts
    found = control(losses, 0.15, CONFIDENCE, low=-1.0)
    both = [walk(losses, 0.15, CONFIDENCE, test) for test in ("learn_then_test", "sharp")]
    assert (found.method, found.monotone) == ("learn_then_test", False)
    assert both[0] is not None and both[1] is not None
    assert found.index == min(both[0], both[1])
    few = samples_needed(TARGET, CONFIDENCE, "learn_then_test")  # the sharp test needs more
    assert few is not None
    dip = np.repeat([[0.0, 1.0, 0.0]], few, 0)
    assert walk(dip, TARGET, CONFIDENCE, "learn_then_test") == 0
    assert control(dip, TARGET, CONFIDENCE).index is None


def test_where_nothing_speaks_against_it_the_sharp_test_decides() -> None:
    losses = drawn(np.random.default_rng(0), "gains", 3000)
    found = control(losses, TARGET, CONFIDENCE, low=-1.0)
    assert (found.method, found.monotone) == ("sharp", True)
    assert found.index == walk(losses, TARGET, CONFIDENCE, "sharp")


# -- p-values and bounds ----------------------------------------------------------------------


def test_p_values_are_small_where_the_risk_is() -> None:
    for test in TESTS.values():
        assert test(np.zeros(1000), 0.01) < 0.01


def test_the_order_of_the_data_wins_no_bet() -> None:
    sorted_by_difficulty = np.repeat([0.0, 1.0], [900, 100])
    images = [ImageRows(str(i), "", (i,)) for i in range(1000)]
    images.sort(key=lambda image: image.rank)
    assert betting_p_value(by_image(sorted_by_difficulty, images), 0.05) > 0.05


@pytest.mark.parametrize("method", TESTS)
def test_a_bound_is_the_least_target_that_passes(method: str) -> None:
    losses = (np.random.default_rng(0).random(500) < 0.03) * 1.0
    bound = upper_bound(losses, 0.95, method)
    over, under = (p_value(losses, t, method, 0.05) for t in (bound + 1e-5, bound - 1e-4))
    assert over <= 0.05 < under


@pytest.mark.parametrize("target", [0.0, 0.2, 1.0])
def test_a_mean_that_is_the_target_says_nothing(target: float) -> None:
    assert hoeffding_bentkus(target, 10, target) == 1.0


def test_a_count_of_losses_is_not_rounded_up_by_floating_point() -> None:
    n, target = 1200, 0.01
    for lost in range(12):
        found = hoeffding_bentkus(float(np.mean([1.0] * lost + [0.0] * (n - lost))), n, target)
        assert found <= math.e * binom.cdf(lost, n, target) + 1e-12


# -- how many samples -------------------------------------------------------------------------


@pytest.mark.parametrize("method", TESTS)
def test_the_stated_need_is_exact_when_nothing_is_lost(method: str) -> None:
    needed = samples_needed(0.01, 0.95, method)
    assert needed is not None
    enough, short = (Draws.of(np.zeros(n), whole=True) for n in (needed, needed - 1))
    assert TESTS[method](enough, 0.01) <= 0.05 < TESTS[method](short, 0.01)


@pytest.mark.parametrize("method", TESTS)
@pytest.mark.parametrize("sizes", [(1,), (1, 1, 1, 5), (3, 4)])
@pytest.mark.parametrize("whole", [True, False])
def test_draws_of_unequal_size_need_as_many_as_the_test_of_no_loss_does(
    method: str, sizes: tuple[int, ...], whole: bool
) -> None:
    def nothing(n: int) -> Draws:
        counts = np.resize(np.array(sizes, float), n)
        none = Draws.of(np.zeros(n), whole=whole and max(sizes) == 1)
        return replace(none, counts=counts, largest=float(max(sizes)))

    few = len(sizes) * 5
    needed = draws_needed(nothing(few), 0.02, 0.95, method)
    assert needed is not None
    enough, short = (p_value(nothing(n), 0.02, method) for n in (needed, needed - 1))
    assert enough <= 0.05 < short
    equal = samples_needed(0.02, 0.95, method)
    assert equal is not None and needed >= 0.9 * equal * max(sizes) / np.mean(sizes)


@pytest.mark.parametrize("n", [66, 337, 2115])
def test_the_least_target_of_no_loss_is_the_closed_form(n: int) -> None:
    exact = Draws.of(np.zeros(n), whole=True)
    assert upper_bound(exact, 0.96, "sharp") == pytest.approx(1 - 0.034 ** (1 / n), abs=2e-6)
    bets = upper_bound(exact, 0.96, "upper_bound")  # each stake gains as much at every draw
    gained = np.exp(SHARES) @ (1 + FRACTIONS * bets / (1 - bets)) ** n
    assert gained == pytest.approx(1 / 0.04, rel=1e-3)


@pytest.mark.parametrize("method", ["upper_bound", "learn_then_test"])
def test_a_walk_goes_on_at_the_level_itself_and_not_above(method: str) -> None:
    needed = samples_needed(0.01, 0.95, method)
    assert needed is not None
    ways = [walk(np.zeros((n, 1)), 0.01, 0.95, method) for n in (needed - 1, needed)]
    assert ways == [None, 0]


def test_learn_then_test_needs_what_the_rule_of_three_says() -> None:
    assert samples_needed(0.01, 0.95, "learn_then_test") == 299


@pytest.mark.parametrize("method", TESTS)
def test_a_measured_risk_needs_more_and_one_above_the_target_has_no_number(method: str) -> None:
    few, more = (samples_needed(0.02, 0.95, method, risk) for risk in (0.0, 0.01))
    assert few is not None and more is not None and few < more
    losses = Draws.of(np.resize(np.eye(1, 100)[0], more), whole=True)  # one in a hundred
    assert TESTS[method](losses, 0.02) <= 0.07
    assert samples_needed(0.02, 0.95, method, 0.02) is None


@pytest.mark.parametrize("risk", [0, 0.001, 0.003, 0.005])
def test_a_first_look_needs_a_tenth_more_images_than_an_exact_test_at_most(risk: float) -> None:
    ours, exact = (images_for(0.01, 0.96, risk, **more) for more in ({}, {"share": 1.0}))
    assert ours is not None and exact is not None and exact <= ours <= 1.1 * exact


def test_images_that_are_added_are_bet_on_and_no_second_exact_test_is_made() -> None:
    alike = np.zeros(1000)
    first = p_value(Draws.of(alike[:300], whole=True), 0.01, "sharp")
    assert p_value(Draws.of(alike[:330], whole=True, looked=300), 0.01, "sharp") == first
    assert p_value(Draws.of(alike, whole=True, looked=300), 0.01, "sharp") < first
    part = p_value(Draws.of(alike[:300], whole=True, looked=0), 0.01, "sharp")
    assert part == pytest.approx(TESTS["upper_bound"](alike[:300], 0.01) / 0.15)
    needed = more_needed(0.01, 0.96, 0.0)
    assert needed is not None
    assert p_value(Draws.of(np.zeros(needed), looked=0), 0.01, "sharp") <= 0.04


@pytest.mark.parametrize("target", [0.02, 0.2])
def test_a_planned_test_of_a_risk_at_the_target_passes_at_its_level_at_most(target: float) -> None:
    """Of gains and drops as of fractions; with a chance that was drawn before."""
    draw, level, trials = np.random.default_rng(17), 0.034, 1500

    def passes(losses: Any) -> bool:
        return planned_p_value(losses, target, level, 1 - draw.random()) <= level

    fractions = [passes(draw.binomial(5, target, 100) / 5) for _ in range(trials)]
    gains = [passes(np.clip(draw.normal(target, 0.1, 100), -1, 1)) for _ in range(trials)]
    spare = 3 * (level / trials) ** 0.5
    assert np.mean(fractions) <= level + spare and np.mean(gains) <= level + spare
    assert np.mean(gains) > level / 2  # and hardly below


def test_losses_between_0_and_1_need_fewer_images_at_a_first_look_than_by_bets() -> None:
    draw = np.random.default_rng(3)
    losses = draw.binomial(5, 0.015, (400, 220)) / 5
    by = {
        method: np.mean([p_value(row, 0.05, method) <= 0.04 for row in losses[:, :140]])
        for method in ("sharp", "upper_bound")
    }
    assert by["sharp"] > by["upper_bound"] + 0.02
