"""Laws of a risk that is watched: a true promise is rarely called broken, a false one soon is."""

from __future__ import annotations

import json

import numpy as np
import pytest

from offramp.promises import betting
from offramp.promises.betting import (
    FRACTIONS,
    Restarts,
    RunningRisk,
    betting_p_value,
    stake_of,
    stakes_above,
)

TARGETS = (0.0075, 0.02, 0.1, 0.5)


def first_alarms(losses: np.ndarray, promised: float, level: float) -> np.ndarray:
    """At which draw, from 1, "the risk is at most `promised`" is called broken at `level`, in each
    stream of losses [n, ...]; 0: never."""
    bets = Restarts(promised, losses.shape[1:])
    found = np.zeros(losses.shape[1:], dtype=int)
    for number, draw in enumerate(losses, 1):
        bets.add(draw)
        found = np.where((found == 0) & (bets.most >= 1 / level), number, found)
    return found


def draws(risk: float, n: int, streams: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random((n, streams)) < risk).astype(float)


@pytest.mark.parametrize("target", TARGETS)
def test_a_promise_that_holds_is_called_broken_at_most_at_its_level(target: float) -> None:
    """Over 3,000 draws, looked at after each: the level is of ever, not of each look."""
    losses = draws(target, 3_000, 300)
    for level in (0.2, 0.02):
        alarms = first_alarms(losses, target, level) > 0
        assert alarms.mean() <= level + 2 * np.sqrt(level / len(alarms))


def test_that_also_holds_of_losses_between_and_of_a_risk_that_moves_below_the_promise() -> None:
    random = np.random.default_rng(1)
    between = random.beta(0.1 * 0.5, 0.9 * 0.5, (2_000, 300))
    assert (first_alarms(between, 0.1, 0.05) > 0).mean() <= 0.05 + 0.02
    moving = 0.05 + 0.05 * np.sin(np.arange(3_000) / 50)[:, None]
    losses = (random.random((3_000, 300)) < moving).astype(float)
    assert (first_alarms(losses, 0.1, 0.05) > 0).mean() <= 0.05


@pytest.mark.parametrize("target", [0.0075, 0.02, 0.1])
def test_a_doubled_risk_is_noticed_within_twenty_over_the_target(target: float) -> None:
    alarms = first_alarms(draws(2 * target, int(100 / target), 100), target, 0.01)
    assert (alarms > 0).all()
    assert np.median(alarms) < 20 / target
    tenfold = first_alarms(draws(min(10 * target, 0.9), int(20 / target), 100), target, 0.01)
    assert (tenfold > 0).all() and np.median(tenfold) < 2 / target


def test_what_was_good_for_long_does_not_delay_an_alarm() -> None:
    """After 5,000 good images a risk 50 and 5 times as high is noticed in about as many as from
    the start; without new starts the first took 100 and the second 1,300 (medians). Half of the
    fortune waits for a cue."""
    good = draws(0.003, 5_000, 50)
    for times, most in ((50, 30), (5, 600)):
        fresh = draws(0.01 * times, 3_000, 50, seed=1)
        alarms = first_alarms(np.concatenate([good, fresh]), 0.01, 0.01)
        assert (alarms > 5_000).all() and np.median(alarms) - 5_000 < most
        alone = np.median(first_alarms(fresh, 0.01, 0.01))
        assert np.median(alarms) - 5_000 < 4 * alone


def test_five_times_the_risk_after_20_000_good_images_is_noticed_within_400() -> None:
    streams = 100
    fresh = draws(0.05, 1_500, streams, seed=2)
    found = first_alarms(np.concatenate([draws(0.003, 20_000, streams), fresh]), 0.01, 0.01)
    assert np.median(found) - 20_000 <= 400 and np.quantile(found, 0.95) - 20_000 <= 600


def test_new_starts_have_shares_of_one_level() -> None:
    """The sum of 1 / (k log(k)^2) from k = 2 on is 2.1097."""
    n = 100_000
    shares = sum(stake_of(start) for start in range(1, n))
    assert shares < 1 and shares + 0.47 / np.log(n) == pytest.approx(0.47 * 2.1097, abs=1e-3)
    bets = Restarts(0.01)
    for loss in draws(0.05, 3_000, 1)[:, 0]:
        bets.add(loss)
    assert bets.cues > 10 and bets.kept > 0 and bets.for_cues > 0


def test_what_an_image_loses_again_is_one_bet_with_what_it_lost_before() -> None:
    risk = RunningRisk(0.05, of_one=2)
    assert [risk.add(1.0, "a") for _ in range(4)] == [True, True, False, False]
    assert risk.n == 2 and risk.mean == 1.0
    for number in range(60):  # bets have started anew, so it is no news any more
        risk.add(0.0, f"{number}")
    assert not risk.add(1.0, "a")


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
def test_a_promise_by_answer_is_not_called_broken_for_images_that_are_asked_about_often(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image in fifty has 40 answers, which are all wrong or all right."""
    monkeypatch.setattr(betting, "CLAIMS", betting.CLAIMS[:1])  # no interval is asked for
    target, alarms, streams = 0.05, 0, 60
    most = max(1, int(np.random.default_rng(0).binomial(40, share, 10_000).max()))
    for seed in range(streams):
        random, risk = np.random.default_rng(seed), RunningRisk(target, 0.05, of_one=most)
        for image in range(600):
            answers = 40 if random.random() < 0.02 else 1
            loss = float(random.random() < target)
            for _ in range(random.binomial(answers, share)):
                risk.add(loss, f"{image}")
        alarms += risk.broken
    assert alarms / streams <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / streams)


def test_what_is_watched_is_the_same_after_a_restart() -> None:
    losses = draws(0.02, 400, 1)[:, 0].tolist()
    whole, part = RunningRisk(0.01), RunningRisk(0.01)
    whole.extend(losses)
    part.extend(losses[:170])
    again = RunningRisk.from_json(json.loads(json.dumps(part.to_json())))
    again.extend(losses[170:])
    assert again.to_json() == whole.to_json()
    kept = part.to_json()
    damaged = (
        {"sides": [[0.0]] * 4},
        {"bets": None},
        {"total": float("nan")},
        {"bets": {**kept["bets"], "fortune": [float("nan")] * 7}},
    )
    for change in damaged:
        with pytest.raises(ValueError, match=r"shape|promise"):
            RunningRisk.from_json({**kept, **change})


def test_no_bet_can_ruin() -> None:
    claims = np.geomspace(1e-5, 0.99, 50)
    stakes = stakes_above(claims)
    assert (stakes > 0).all()
    assert (1 - stakes * claims[:, None] >= 0.1 - 1e-9).all()


def test_one_by_one_is_the_same_as_all_together() -> None:
    losses = draws(0.04, 800, 5)
    for stream in range(5):
        risk = RunningRisk(0.02, level=0.05)
        seen = 0
        for number, loss in enumerate(losses[:, stream], 1):
            risk.add(loss)
            seen = seen or number * risk.broken
        assert seen == first_alarms(losses, 0.02, 0.05)[stream]
        assert risk.n == 800 and risk.mean == pytest.approx(losses[:, stream].mean())


def test_the_interval_covers_the_risk_at_all_times_together() -> None:
    missed = 0
    for seed in range(20):
        risk = RunningRisk(None, confidence=0.8)
        wrong = False
        for loss in draws(0.05, 500, 1, seed)[:, 0]:
            risk.add(loss)
            low, high = risk.interval
            wrong |= not low <= 0.05 <= high
        missed += wrong
    assert missed <= 0.2 * 20 + 2 * np.sqrt(20 * 0.2 * 0.8)
    assert 0 < low < 0.05 < high < 0.12


def test_the_upper_end_is_what_calibration_would_bound() -> None:
    losses = draws(0.01, 600, 1)[:, 0]
    risk = RunningRisk(None, confidence=0.9)
    risk.extend(losses.tolist())
    _, high = risk.interval
    assert betting_p_value(losses, high) <= 0.05 < betting_p_value(losses, high / 1.08)


def test_without_a_promise_nothing_is_broken_and_no_loss_is_out_of_range() -> None:
    risk = RunningRisk(None)
    assert risk.mean is None and risk.interval == (0.0, 1.0)
    risk.extend([1.0] * 500)
    assert not risk.broken and risk.interval[0] > 0.9
    for loss in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="not in"):
            risk.add(loss)
    assert len(FRACTIONS) == 4
