"""Laws of likeness: requests like the calibrated ones are seldom called unlike, others soon are."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from offramp.likeness import UNLIKE, Alarm, Kept, Likeness, mean_log_score


def test_a_p_value_is_the_share_of_calibrated_answers_that_are_no_surer() -> None:
    kept = Kept.of([-0.001 * i for i in range(1000)])
    assert kept.n == 1000 and len(kept.low) == 50
    assert kept.p_value(-2.0) == pytest.approx(1 / 1001)
    assert kept.p_value(-0.990) == pytest.approx(11 / 1001)
    assert kept.p_value(-0.5) == kept.p_value(0.0) == 1.0


def test_of_requests_like_the_calibrated_ones_at_most_one_in_a_hundred_is_called_unlike() -> None:
    draw, called = np.random.default_rng(0), []
    for _ in range(100):
        kept = Kept.of(draw.normal(size=1000).tolist())
        called.append(np.mean([kept.p_value(mean) <= UNLIKE for mean in draw.normal(size=1000)]))
    assert np.mean(called) <= 0.006 and np.quantile(called, 0.9) <= 0.01


@pytest.mark.parametrize("n", [200, 1000])
def test_streams_like_the_calibrated_answers_raise_no_alarm(n: int) -> None:
    """All requests of a stream share one set of calibrated answers, and its luck."""
    draw, alarms = np.random.default_rng(n), 0
    for _ in range(100):
        likeness = Likeness.of(np.exp(draw.normal(size=(n, 1))).tolist(), ["Caption:"] * n)
        alarm = Alarm(likeness)
        for scores in np.exp(draw.normal(size=(400, 1))).tolist():
            found = likeness.p_value("Caption:", scores)
            assert found is not None
            alarm.add(found)
        alarms += alarm.raised
    assert alarms == 0


@pytest.mark.parametrize("n", [200, 1000])
def test_an_alarm_is_raised_within_five_unlike_requests(n: int) -> None:
    draw = np.random.default_rng(1)
    likeness = Likeness.of(draw.uniform(0.9, 1, (n, 3)).tolist(), ["Caption:"] * n)
    alarm = Alarm(likeness)
    for _ in range(5):
        found = likeness.p_value("Caption:", [0.3, 0.4])
        assert found is not None and found <= UNLIKE
        alarm.add(found)
    assert alarm.raised and alarm.unlike == alarm.compared == 5


def test_nothing_is_said_of_what_is_not_known() -> None:
    few = Likeness.of([[0.9]] * 100, ["Caption:"] * 100)
    assert few.p_value("Caption:", [0.1]) is None  # one of 100 is no rarer than one in 101
    enough = Likeness.of([[0.9]] * 300, ["Caption:"] * 300)
    assert enough.p_value("Question:", [0.1]) is None
    assert enough.p_value("Caption:", [math.nan]) is None
    assert enough.p_value("Caption:", []) is None
    assert mean_log_score([0.0, math.nan, 1.0]) == pytest.approx(math.log(1e-6) / 2)


def test_what_is_kept_is_the_same_after_it_was_stored() -> None:
    made = Likeness.of([[0.5 + i / 1000] for i in range(400)], ["a", "b"] * 200)
    stored = json.loads(json.dumps(made.to_json()))
    assert Likeness.from_json(stored) == made
    for odd in (None, {}, [], {"a": 3}, {"a": {"n": "x", "low": [1]}}, {"a": {"low": None}}):
        assert Likeness.from_json(odd).kinds == {}  # type: ignore[arg-type]
