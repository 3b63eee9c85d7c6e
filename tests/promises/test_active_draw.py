"""Laws of a draw by doubts: it is fair whatever these say, and shows a larger risk sooner where
they tell something."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from offramp.promises.active_draw import BLOCK, MOST, chances, doubt
from offramp.promises.betting import Restarts

LEVEL = 0.01


@pytest.mark.parametrize(
    "doubts",
    [
        [0.0] * 4,
        [1.0, 0.0, 0.0, 7.0],
        [np.nan] * 3,
        [np.nan, 2.0, 4.0],
        [1e300, 1.0],
        [0.0, np.nan],
    ],
)
def test_chances_sum_to_one_and_none_is_below_half_of_a_uniform_one(doubts: list[float]) -> None:
    each = chances(np.array(doubts))
    assert each.sum() == pytest.approx(1.0)
    assert (each >= 1 / (MOST * len(doubts))).all()


def test_a_doubt_that_is_not_known_is_the_mean_of_those_that_are() -> None:
    assert (
        chances(np.array([np.nan, 2.0, 4.0])).tolist()
        == chances(np.array([3.0, 2.0, 4.0])).tolist()
    )
    assert np.isnan(doubt([])) and np.isnan(doubt([float("nan")]))
    assert 0 == doubt([1.0]) < doubt([0.9]) < doubt([0.9, 0.5]) < doubt([0.5])


def test_what_is_seen_of_a_block_has_the_mean_of_the_block() -> None:
    draw = np.random.default_rng(0)
    doubts, losses = draw.exponential(size=(50, BLOCK)), draw.random((50, BLOCK))
    each = chances(doubts)
    seen = losses / (BLOCK * each)
    assert (each * seen).sum(-1) == pytest.approx(losses.mean(-1))
    assert seen.max() <= MOST


def alarms(promised: float, risk: float, draw: Any, block: int, *, tells: bool, most: int) -> Any:
    """After how many comparisons each of 200 streams raises the alarm, 0 where none does: a tenth
    of the answers has eight tenths of the risk, and doubts tell which these are, or nothing."""
    streams = 200
    bets, found = Restarts(promised, (streams,)), np.zeros(streams, dtype=int)
    for number in range(1, most + 1):
        unsure = draw.random((streams, block)) < 0.1
        rates = np.where(unsure, 8.0, 2 / 9)
        losses = (draw.random((streams, block)) < risk * rates).astype(float)
        each = chances(rates if tells else 20 / rates)
        place = (each.cumsum(-1) < draw.random((streams, 1))).sum(-1).clip(max=block - 1)
        rows = np.arange(streams), place
        bets.add(losses[rows] / (block * each[rows]))
        found = np.where((found == 0) & (bets.most >= 1 / LEVEL), number, found)
        if (found > 0).all():
            break
    return found


@pytest.mark.parametrize("tells", [True, False])
def test_a_promise_that_just_holds_is_called_broken_at_most_at_the_level(tells: bool) -> None:
    """Also where doubts point the wrong way."""
    draw = np.random.default_rng(1)
    false = alarms(0.05, 0.05, draw, BLOCK, tells=tells, most=1500) > 0
    assert false.mean() <= LEVEL + 2.5 * (LEVEL / 200) ** 0.5


def test_where_doubts_tell_half_of_the_comparisons_show_five_times_the_risk() -> None:
    draw = np.random.default_rng(2)
    uniform, active = (
        np.median(alarms(0.02, 0.1, draw, block, tells=True, most=1000)) for block in (1, BLOCK)
    )
    assert 0 < active < uniform / 2
