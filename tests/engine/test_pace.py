"""Laws of the pace: exits that do not pay are left alone, and what changed is found out."""

from __future__ import annotations

import pytest
import torch
from families import one_row

from offramp.engine.decoding import pace as pace_module
from offramp.engine.decoding.pace import Pace
from offramp.engine.decoding.scheduler import Schedule
from offramp.engine.generate import generate
from offramp.engine.policy import FULL, ExitPolicy
from offramp.serving.core import EngineCore
from offramp.serving.engine_config import EngineConfig
from offramp.serving.request import Request

NAME = "blip2-opt"
SLOTS = 8


class Engine:
    """Answers of `length` tokens under a pace, one set of sequences after the other.

    exits, full: tokens a second of all sequences together, with exits and at full depth. One call
    with exits settles a token of each sequence.
    """

    def __init__(self, exits, full, rows=SLOTS, length=50, exiting=False, fixed=False):
        self.exits, self.full, self.rows, self.length = exits, full, rows, length
        self.exiting, self.pace = exiting, Pace(fixed, clock=lambda: 0.0)
        self.tokens, self.seconds = 0, 0.0

    def run(self, answers):
        """Tokens a second over so many answers."""
        began, spent = self.tokens, self.seconds
        for _ in range(answers // self.rows):
            uses = self.pace.exits_pay(exiting=self.exiting)
            for _ in range(self.length):
                if uses and self.pace.wants_trial():
                    self.seconds += self.rows / self.full
                    self.pace.tried(self.rows, self.rows / self.full)
                took = self.rows / (self.exits if uses else self.full)
                self.seconds += took
                self.tokens += self.rows
                self.pace.note(self.rows, self.rows, took, exiting=self.exiting, exits=uses)
            for _ in range(0 if uses else self.rows):
                self.pace.answered(exiting=self.exiting)
        return (self.tokens - began) / (self.seconds - spent)


@pytest.mark.parametrize("exiting", [False, True])
@pytest.mark.parametrize("rows", [1, 2, SLOTS])
@pytest.mark.parametrize("exits", [90.0, 30.0])
def test_where_exits_do_not_pay_speed_is_within_3_percent_of_full_depth(exits, rows, exiting):
    engine = Engine(exits, 100.0, rows=rows, exiting=exiting)
    engine.run(512 * 3)
    assert engine.run(512 * 8) > 0.97 * 100.0


@pytest.mark.parametrize("rows", [1, 2, SLOTS])
def test_where_exits_pay_they_are_used_and_trials_take_a_hundredth(rows):
    engine = Engine(150.0, 100.0, rows=rows)
    assert engine.run(400) > 0.97 * 150.0


def test_that_exits_do_not_pay_is_known_after_the_first_answers():
    engine = Engine(40.0, 100.0)
    engine.run(SLOTS)
    assert not engine.pace.exits_pay(exiting=False)


@pytest.mark.parametrize(("before", "after"), [(50.0, 150.0), (150.0, 50.0)])
def test_it_is_found_out_when_exits_do_better_or_worse(before, after):
    engine = Engine(before, 100.0)
    engine.run(1000)
    engine.exits = after
    engine.run(4000)
    assert engine.run(2000) > 0.95 * max(100.0, after)


def test_other_numbers_of_sequences_are_judged_anew():
    engine = Engine(50.0, 100.0)
    engine.run(64)
    assert not engine.pace.exits_pay(exiting=False)
    engine.rows, engine.exits, engine.full = 1, 30.0, 15.0
    engine.run(3000)
    assert engine.run(1000) > 0.95 * 30.0


def test_a_schedule_that_was_given_means_that_exits_are_used():
    engine = Engine(40.0, 100.0, fixed=True)
    assert engine.run(500) == pytest.approx(40.0)


def test_tokens_are_the_same_while_what_the_engine_does_changes(
    backbone, exits, batch, monkeypatch
):
    """All kinds of requests: those that name early exit get it, whatever pays."""
    for name, value in {"WARM": 2, "SHARE": 0.3, "ENOUGH": 4, "RETRY": 1}.items():
        monkeypatch.setattr(pace_module, name, value)
    whole, policy = backbone(NAME), ExitPolicy({2: 0.05})
    rows = [one_row(NAME, batch(NAME, 4), row) for row in range(4)]
    tick = iter(range(1_000_000))
    engine = EngineCore(
        whole, exits(NAME), policy, EngineConfig(slots=3, limit=64), clock=lambda: next(tick)
    )
    options = {"max_new_tokens": 12, "do_sample": False}
    modes = [*["early_exit"] * 6, *["lossless"] * 6, "full", "early_exit", "lossless"]
    asked = [engine.add(Request(rows[i % 4], m, options=options)) for i, m in enumerate(modes)]
    engine.run()
    assert engine.calls["trial"] > 0 and engine.calls["feed"] > 0
    for i, (mode, handle) in enumerate(zip(modes, asked, strict=True)):
        alone = generate(
            whole, rows[i % 4], exits=exits(NAME), policy=policy.in_mode(mode), **options
        )
        given = handle.result().output
        assert torch.equal(given.sequences, alone.sequences)
        if mode == "early_exit":
            assert torch.equal(given.depths, alone.depths)
            assert torch.allclose(given.scores, alone.scores, atol=1e-4, equal_nan=True)


def test_a_request_of_no_mode_gets_the_full_models_tokens_where_exits_do_not_pay(
    backbone, exits, batch, monkeypatch
):
    whole, row, policy = backbone(NAME), one_row(NAME, batch(NAME, 1), 0), ExitPolicy({2: 0.05})
    engine = EngineCore(whole, exits(NAME), policy, EngineConfig(slots=2, limit=64))
    options = {"max_new_tokens": 9, "do_sample": False}
    for pays in (True, False):
        monkeypatch.setattr(engine.pace, "exits_pay", lambda *, exiting, pays=pays: pays)
        handle = engine.add(Request(row, options=options))
        engine.run()
        alone = generate(whole, row, exits=exits(NAME), policy=policy if pays else FULL, **options)
        assert torch.equal(handle.result().output.sequences, alone.sequences)
        assert handle.result().early_exit is pays


def test_a_schedule_that_never_runs_is_refused():
    with pytest.raises(Exception, match="never runs"):
        Schedule(-1, 1)
