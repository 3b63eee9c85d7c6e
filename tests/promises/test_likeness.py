"""Laws of likeness: requests like the calibrated ones are seldom called unlike, others soon are."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from PIL import Image

from offramp.core.errors import DataError
from offramp.data.scenes import tasks
from offramp.promises.likeness import (
    AGE,
    UNLIKE,
    Alarm,
    Kept,
    Likeness,
    Looks,
    is_unlike,
    look_of,
    mean_log_score,
)


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


@pytest.mark.slow
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


def test_the_fewest_answers_that_are_held_to_call_the_least_sure_one_unlike() -> None:
    kept = Kept.of([-0.01 * i for i in range(199)])
    assert kept.can_call(UNLIKE) and is_unlike(kept.p_value(-9.0))
    assert not Kept.of([-0.01 * i for i in range(198)]).can_call(UNLIKE)


def test_a_distance_is_held_to_the_other_images() -> None:
    """As if each were left out of the mean and covariance."""
    looks = np.random.default_rng(2).normal(size=(30, 4)) * [1, 2, 3, 4]
    far = Looks.of(looks).kept.low
    left = []
    for i in range(len(looks)):
        others = np.delete(looks, i, 0)
        out = looks[i] - others.mean(0)
        left.append(-math.sqrt(out @ np.linalg.inv(np.cov(others.T)) @ out))
    assert far == pytest.approx(sorted(left)[: len(far)], rel=1e-3)


def test_of_scores_and_looks_at_most_one_in_a_hundred_is_called_unlike() -> None:
    draw, called = np.random.default_rng(3), []
    for _ in range(40):
        scores, looks = draw.uniform(size=(600, 1)), draw.standard_t(5, size=(600, 20))
        known = Likeness.of(scores.tolist(), [""] * 600, looks)
        assert known.looks_at_images
        fresh = zip(draw.uniform(size=(500, 1)), draw.standard_t(5, size=(500, 20)), strict=True)
        found = [known.p_value("", score.tolist(), look) for score, look in fresh]
        called.append(np.mean([p is not None and p <= UNLIKE for p in found]))
    assert np.mean(called) <= 0.007 and np.quantile(called, 0.9) <= 0.015


@pytest.mark.slow
def test_an_image_of_another_world_is_called_unlike_however_sure_its_answer_is() -> None:
    scenes = [example.open_image() for example in tasks.captions("test", 420, 5).examples]
    looks = np.array([look_of(image) for image in scenes])
    known = Likeness.of([[0.9]] * 400, ["Caption:"] * 400, looks[:400])
    stored = Likeness.from_json(json.loads(json.dumps(known.to_json())))
    assert stored.to_json() == known.to_json()
    noise = look_of(Image.effect_noise((72, 72), 90).convert("RGB"))
    for likeness in (known, stored):
        found = likeness.p_value("Caption:", [1.0], noise)
        assert found is not None and found <= UNLIKE
        own = [likeness.p_value("Caption:", [1.0], look) for look in looks[400:]]
        assert sum(p is not None and p <= UNLIKE for p in own) <= 2
        assert likeness.p_value("Caption:", [1.0]) == 1.0  # no image was looked at


def test_few_images_leave_the_scores_alone() -> None:
    looks = np.random.default_rng(4).normal(size=(300, 20))
    known = Likeness.of([[0.9]] * 600, [""] * 600, looks)
    found = known.test("", [0.9], looks[0] + 100)
    assert (found.p_value, found.untested) == (1.0, "likeness of the image not tested")


def test_the_looks_of_all_kinds_are_those_of_each_and_silence_is_said() -> None:
    looks = np.random.default_rng(5).normal(size=(450, 20))
    kinds = ["Caption:"] * 400 + ["Question:"] * 50
    known = Likeness.of([[0.9]] * 450, kinds, looks)
    assert known.p_value("Question:", [0.9], looks[0] + 100) == pytest.approx(1 / 451)
    assert known.test("Question:", [0.9], looks[0]).untested == ""
    few = Likeness.of([[0.9]] * 73, ["Question:"] * 73, looks[:73])
    for kind in ("Question:", "Caption:"):
        found = few.test(kind, [0.1], looks[0] + 100)
        assert found.p_value is None and found.untested.startswith("likeness not tested (")
    assert "(73 images)" in few.test("Question:", [0.1]).untested


def test_looks_that_each_kind_had_of_its_own_are_read_as_those_of_all() -> None:
    looks = np.random.default_rng(6).normal(size=(450, 20))
    new = Likeness.of([[0.9]] * 450, ["a", "b"] * 225, looks)
    stored = new.to_json()
    old = {kind: kept for kind, kept in stored["kinds"].items()}
    old["a"] = {**old["a"], "looks": stored["looks"]}
    assert Likeness.from_json(old).to_json() == stored


# -- the alarm -------------------------------------------------------------------------------------


def known() -> Likeness:
    return Likeness.of([[0.9 + i / 1e4] for i in range(400)], ["Caption:"] * 400)


def test_one_client_does_not_raise_the_alarm_while_others_ask() -> None:
    alarm = Alarm(known())
    for number in range(200):
        alarm.add(1.0, f"client {number % 9}")
        alarm.add(0.001, "odd")
    assert alarm.unlike == 200 and not alarm.raised
    for number in range(10):
        alarm.add(0.001, f"client {number % 9}")
    assert alarm.raised


def test_an_alarm_ends_with_its_cause_and_by_a_reset() -> None:
    alarm = Alarm(known())
    for end in ("age", "reset"):
        for _ in range(5):
            alarm.add(0.001)
        assert alarm.raised
        if end == "reset":
            alarm.reset()
            assert (alarm.compared, alarm.unlike) == (0, 0)
        for number in range(AGE if end == "age" else 0):
            assert alarm.raised or number > AGE - 5
            alarm.add(1.0)
        assert not alarm.raised


def test_an_alarm_is_kept_over_a_restart() -> None:
    alarm, again = Alarm(known()), Alarm(known())
    for _ in range(5):
        alarm.add(0.001)
    again.restore(json.loads(json.dumps(alarm.to_json())))
    assert again.raised and (again.compared, again.unlike) == (5, 5)
    again.restore({"compared": "x"})
    assert not again.raised and again.compared == 0


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 7), (3, 500), (4000, 3000)])
def test_an_image_of_any_size_is_looked_at(size: tuple[int, int]) -> None:
    look = look_of(Image.new("L", size, 200))
    assert look.shape == (20,) and np.isfinite(look).all()


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
    for none in (None, {}):
        assert Likeness.from_json(none).kinds == {}
    for odd in ([], {"a": 3}, {"a": {"n": "x", "low": [1]}}, {"a": {"low": None}}):
        with pytest.raises(DataError) as error:
            Likeness.from_json(odd)  # type: ignore[arg-type]
        assert len(str(error.value).splitlines()) == 2
