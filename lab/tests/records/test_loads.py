"""Laws of the benchmarks under load: nothing is kept of a request, and both sides do the same."""

from __future__ import annotations

import random

import pytest
from families import one_row

from offramp.adapter import Adapter
from offramp.engine.policy import ExitPolicy
from offramp.serving.core import EngineCore
from offramp.serving.engine_config import EngineConfig
from offramp_lab.experiments.benchmark.unit_costs import CallCosts
from offramp_lab.records.loads.arrivals import (
    Arrival,
    Clock,
    in_static_batches,
    in_the_engine,
    poisson,
    predicted_engine,
    predicted_static,
)
from offramp_lab.records.loads.memory import answered, engine_of, held

NAME = "blip2-opt"


def test_nothing_grows_with_requests_of_all_modes_some_cancelled(backbone, exits, batch):
    adapter = Adapter(backbone(NAME), exits(NAME), ExitPolicy({2: 0.05}))
    rows = [one_row(NAME, batch(NAME, 4), row) for row in range(4)]
    core, looks = engine_of(adapter, 3), []
    for part, count in enumerate((50, 150)):
        ends = answered(core, rows, count, random.Random(part), longest=4)
        assert ends["answered"] + ends["cancelled"] == count and ends["cancelled"]
        looks.append(held(core))
    before, after = looks
    assert (before["tensors"], before["slots"]) == (after["tensors"], after["slots"])
    assert after["objects"] <= before["objects"] + 20  # what Python itself keeps


def test_static_batches_and_the_engine_answer_the_same_arrivals(backbone, batch):
    inputs = one_row(NAME, batch(NAME, 1), 0)
    arrivals = [Arrival(at, length) for at, length in ((0.0, 2), (0.1, 9), (1000.0, 3))]
    work = iter(range(10**6))
    clock = Clock(lambda: next(work) / 1000)
    static = in_static_batches(backbone(NAME), inputs, arrivals, 2, clock)
    clock = Clock(lambda: next(work) / 1000)
    core = EngineCore(backbone(NAME), config=EngineConfig(slots=2, limit=64), clock=clock)
    engine = in_the_engine(core, inputs, arrivals, clock)
    for outcome in (static, engine):
        assert outcome.tokens == 14 and len(outcome.gaps) == 11
        assert 1000.0 < outcome.seconds < 1001.0  # what nobody waits for costs nothing
        assert max(outcome.totals) < 1.0
    assert (static.steps, engine.steps) == (8 + 2, 1 + 8 + 2)  # the second came behind the first


def test_what_is_predicted_of_one_row_is_counted_by_hand():
    one = ((1, 1.0),)
    costs = CallCosts(1, 1, one, one, one, one, 10.0)
    arrivals = [Arrival(0.0, 3), Arrival(5.0, 2)]
    assert predicted_engine(arrivals, 1, costs) == pytest.approx(12 + 11)
    assert predicted_static(arrivals, 2, 20.0, 1.0) == pytest.approx(5 + 20 + 2)


def test_arrivals_are_drawn_at_their_rate():
    drawn = poisson(4.0, 2000, (5, 60), seed=0)
    assert drawn == poisson(4.0, 2000, (5, 60), seed=0)
    assert drawn[-1].at / 2000 == pytest.approx(1 / 4, rel=0.1)
    assert {arrival.length for arrival in drawn} == set(range(5, 61))
