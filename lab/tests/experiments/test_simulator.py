"""Laws of the simulation, which runs the engine's own decoder, and of the costs that it is told."""

from __future__ import annotations

import random

import pytest

from offramp.engine.decoding.scheduler import Schedule
from offramp.models.exits import ExitSet
from offramp.serving.engine_config import EngineConfig
from offramp_lab.experiments.benchmark.scripted_reader import drawn
from offramp_lab.experiments.benchmark.simulator import full_depth, replay
from offramp_lab.experiments.benchmark.unit_costs import CallCosts, measure_calls, seconds

FEED, DEEP, HEAD, READ = 2.0, 5.0, 1.0, 3.0


def costs(slots=4):
    """Calls that cost the same over any number of tokens."""

    def flat(took):
        return ((1, took), (64, took))

    return CallCosts(slots, 10, flat(FEED), flat(DEEP), flat(HEAD), flat(10.0), READ)


def simulated(exits, right=0.7, schedule=None, *, guess=True, longest=40):
    """Tokens a second of 80 answers; exits, right: shares that are drawn."""
    draw = random.Random(0)
    lengths = [draw.randint(40, longest) for _ in range(80)]
    schedule = schedule or Schedule.of(4)
    return replay(
        costs(), drawn(exits, right), lengths, schedule, guess=guess, slots=4
    ).tokens_per_second


def test_if_all_tokens_exit_only_calls_that_feed_are_paid():
    assert simulated(1.0) == pytest.approx(4 / FEED)


@pytest.mark.parametrize("patience", [1, 3])
def test_if_no_guess_is_right_every_flush_gives_a_row_one_token(patience):
    # Equal lengths, so that all rows end with the same call.
    found = simulated(0.0, 0.0, Schedule(patience=patience, idle=4))
    assert found == pytest.approx(4 / ((patience + 1) * FEED + DEEP + HEAD), rel=0.04)


def test_if_rows_park_every_token_takes_both_calls():
    found = simulated(0.0, schedule=Schedule(patience=4, idle=4), guess=False)
    assert found == pytest.approx(4 / (FEED + DEEP + HEAD))


def test_more_exits_and_better_guesses_are_never_slower():
    rates = [simulated(exits, 0.5, longest=80) for exits in (0.0, 0.5, 0.9, 1.0)]
    rights = [simulated(0.5, right, longest=80) for right in (0.0, 0.5, 0.9, 1.0)]
    assert rates == sorted(rates)
    assert rights == sorted(rights)


def test_full_depth_is_one_call_a_token():
    assert full_depth(costs(), 4) == pytest.approx(4 / 10.0)


def test_costs_are_linear_between_what_was_measured_and_beyond():
    table = ((1, 1.0), (4, 2.0), (8, 4.0))
    assert [seconds(table, n) for n in (1, 2.5, 8, 12)] == pytest.approx([1.0, 1.5, 4.0, 6.0])


@pytest.mark.parametrize(
    ("name", "engine"), [("blip2-opt", "slots"), ("blip2-t5", "slots"), ("llava", "stack")]
)
def test_measured_costs_grow_with_tokens(name, engine, backbone, exits, batch, monkeypatch):
    whole, some, inputs = backbone(name), ExitSet.of(exits(name)), batch(name, 1)
    monkeypatch.setattr(whole, "engine", engine)
    config = EngineConfig(slots=3, limit=64)
    found = measure_calls(whole, some, inputs, config, repeats=1, most=8, answer=5)
    assert CallCosts.median([found, found, found]) == found
    if engine == "slots":
        prompt = 1 if whole.is_encoder_decoder else inputs["input_ids"].shape[1]
        assert found.context == prompt + 5
    assert [n for n, _ in found.feed] == [1, 2, 3]
    assert [n for n, _ in found.deep] == [1, 2, 4, 8]
    for table in (found.feed, found.deep, found.head, found.full):
        took = [s for _, s in table]
        assert took == sorted(took)
        assert took[0] > 0
