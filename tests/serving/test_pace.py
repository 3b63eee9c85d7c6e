"""Laws of the pace: exits that do not pay are left alone, and tried again now and then."""

from __future__ import annotations

import pytest
import torch
from families import one_row

from offramp.engine.generate import generate
from offramp.engine.policy import ExitPolicy
from offramp.serving.core import EngineConfig, EngineCore
from offramp.serving.request import Request
from offramp.serving.schedule import pace as pace_module
from offramp.serving.schedule.pace import Pace
from offramp.serving.schedule.scheduler import Schedule, Tally
from offramp.serving.schedule.unit_costs import CallCosts

NAME = "blip2-opt"


def costs(deep):
    """Shallow calls of 1, deep ones of `deep`, full ones of 5, whatever runs in them."""

    def flat(took):
        return ((1, took), (64, took))

    return CallCosts(3, 10, flat(1.0), flat(deep), flat(0.1), flat(5.0), 1.0)


def pace(found, tally, fixed=False):
    tallies = {True: tally, False: Tally()}
    return Pace(found, Schedule(), tallies, slots=3, longest=16, fixed=fixed)


@pytest.mark.parametrize(("deep", "pays"), [(4.0, True), (60.0, False)])
def test_exits_are_used_where_they_pay(deep, pays):
    ours = pace(costs(deep), Tally(exited=700, guessed=300, ruled=300, right=200))
    ours.review(pace_module.EVERY)
    assert ours.pays(True) is pays
    admitted = [ours.admits() for _ in range(2 * pace_module.PROBE)]
    assert sum(admitted) == (len(admitted) if pays else 2)  # it still probes


def test_nothing_is_judged_before_enough_was_seen():
    ours = pace(costs(60.0), Tally(guessed=10))
    ours.review(pace_module.EVERY)
    assert ours.pays(True)


def test_the_deep_layers_wait_longer_where_guesses_hold():
    patient, hasty = (
        pace(costs(20.0), Tally(exited=500, guessed=500, ruled=500, right=right))
        for right in (495, 5)
    )
    for turn in range(1, 4):
        for ours in (patient, hasty):
            ours.review(turn * pace_module.EVERY)
    assert patient.schedule.patience > hasty.schedule.patience


def test_a_schedule_that_was_given_stays():
    ours = pace(costs(20.0), Tally(exited=500, guessed=500, ruled=500, right=495), fixed=True)
    ours.review(pace_module.EVERY)
    assert ours.schedule == Schedule()


def test_rows_go_on_exactly_where_full_depth_takes_over(backbone, exits, batch, monkeypatch):
    """Lossless rows change to full depth and back in mid-answer; requests of no mode go full."""
    monkeypatch.setattr(pace_module, "EVERY", 12)
    monkeypatch.setattr(pace_module, "ENOUGH", 4)
    monkeypatch.setattr(pace_module, "PROBE", 3)
    whole = backbone(NAME)
    rows = [one_row(NAME, batch(NAME, 4), row) for row in range(4)]
    config = EngineConfig(slots=3, limit=64)
    policy = ExitPolicy({2: 0.05})
    engine = EngineCore(whole, exits(NAME), policy, config, costs=costs(90.0))
    options = {"max_new_tokens": 9, "do_sample": False}
    lossless = [engine.add(Request(rows[i % 4], "lossless", options=options)) for i in range(9)]
    engine.run()
    assert min(engine.calls.values()) > 0  # it did change
    for i, handle in enumerate(lossless):
        alone = generate(whole, rows[i % 4], **options)
        assert torch.equal(handle.result().output.sequences, alone.sequences)
    free = [engine.add(Request(rows[i % 4], options=options)) for i in range(9)]
    engine.run()
    early = [handle.result().early_exit for handle in free]
    assert 0 < sum(early) < len(early)
    for i, handle in enumerate(free):
        own = policy if handle.result().early_exit else ExitPolicy()
        alone = generate(whole, rows[i % 4], exits=exits(NAME), policy=own, **options)
        assert torch.equal(handle.result().output.sequences, alone.sequences)


def test_an_engine_that_measured_its_calls_goes_by_them_and_answers_as_before(
    backbone, exits, batch
):
    whole, row = backbone(NAME), one_row(NAME, batch(NAME, 1), 0)
    policy, options = ExitPolicy({2: 0.05}), {"max_new_tokens": 9, "do_sample": False}
    engine = EngineCore(whole, exits(NAME), policy, EngineConfig(slots=2, limit=64))
    assert engine.tune(row, repeats=1) == engine.pace.costs
    handle = engine.add(Request(row, options=options))
    engine.run()
    alone = generate(whole, row, exits=exits(NAME), policy=policy, **options)
    assert torch.equal(handle.result().output.sequences, alone.sequences)
