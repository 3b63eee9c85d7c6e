"""Laws of the pace: exits that do not pay are left alone, and what changed is found out."""

from __future__ import annotations

import random

import pytest
import torch
from families import one_row

from offramp.engine.generate import generate
from offramp.engine.policy import ExitPolicy
from offramp.serving.core import EngineConfig, EngineCore
from offramp.serving.request import Request
from offramp.serving.rows.row import Choice, Row
from offramp.serving.schedule import pace as pace_module
from offramp.serving.schedule.pace import Pace
from offramp.serving.schedule.scheduler import Load, Schedule, Tally, due

NAME = "blip2-opt"
SLOTS = 8
LOOK = 0.1
"""What looking at the exits adds to a full call."""


class Engine:
    """Rows under a pace, at costs that are set: seconds of shallow, deep and full
    calls. rate: share of tokens that exit (0: lossless); right: of guesses. more: seconds for each
    token of a deep call. length: of an answer, in tokens."""

    def __init__(
        self,
        shallow,
        deep,
        full,
        rate=0.0,
        right=0.7,
        rows=SLOTS,
        schedule=None,
        more=0.0,
        length=50,
    ):
        self.length = length
        self.took, self.more = {"shallow": shallow, "deep": deep, "full": full}, more
        self.rate, self.right, self.exiting = rate, right, rate > 0
        self.draw = random.Random(0)
        self.rows = [Row(0, Choice(0, 0)) for _ in range(rows)]
        self.tallies = {True: Tally(), False: Tally()}
        self.pace = Pace(schedule, self.tallies, slots=SLOTS, longest=64, clock=lambda: 0.0)
        self.seconds, self.tokens, self.calls = 0.0, 0, []

    def run(self, tokens):
        """Tokens a second while so many more are settled."""
        began, spent = self.tokens, self.seconds
        while self.tokens < began + tokens:
            load = Load.of(self.rows, 64)
            call = self.pace.next_call(load, exits=True, exiting=self.exiting)
            size = getattr(self, call)()
            kind = {"flush": "deep", "step": "full"}.get(call, call)
            took = self.took[kind] * (1 + LOOK * (call == "step"))
            took += self.more * size * (kind == "deep")
            self.seconds += took
            self.tokens += sum(len(row.settle()) for row in self.rows)
            for row in self.rows:
                if row.settled >= self.length:
                    self.pace.answered(row.settled)
                    row.__init__(0, Choice(0, 0))
            self.pace.note(call, size, took)
            self.calls.append(call)
        return (self.tokens - began) / (self.seconds - spent)

    def look(self, row):
        """What an exit says, and at once or later the full model's word on it."""
        tally = self.tallies[self.exiting]
        if self.draw.random() < self.rate:
            tally.exited += 1
            row.say(Choice(0, 0))
        else:
            tally.guessed += 1
            row.guess(Choice(int(self.draw.random() >= self.right), 0))

    def shallow(self):
        for row in self.rows:
            if row.ready(64):
                self.look(row)
            else:
                row.wait()
        return len(self.rows)

    def answer(self, rows):
        for row in rows:
            for place in row.questions:
                right = row.answer(place, Choice(0, 0))
                self.tallies[self.exiting].rule(right)
                if not right:
                    break
            row.caught_up()

    def deep(self):
        taken = [row for row, on in zip(self.rows, due(self.rows, 64), strict=True) if on]
        states = sum(row.pending for row in taken)
        self.answer(taken)
        return states

    def flush(self):
        states = sum(row.pending for row in self.rows)
        self.answer(self.rows)
        return states

    def full(self):
        assert not self.exiting
        for row in self.rows:
            row.passed(Choice(0, 0))
        return len(self.rows)

    def step(self):
        assert not any(row.pending for row in self.rows)
        for row in self.rows:
            self.look(row)
        self.answer(self.rows)
        return len(self.rows)


@pytest.mark.parametrize("rows", [1, 2, SLOTS])
@pytest.mark.parametrize("deep", [30.0, 300.0])
def test_where_exits_do_not_pay_lossless_rows_are_within_3_percent_of_full_depth(deep, rows):
    engine = Engine(4.0, deep, 10.0, right=0.5, rows=rows)
    engine.run(50 * rows)
    assert engine.run(1000 * rows) > 0.97 * rows / 10.0


def test_the_first_review_is_early_enough_for_a_few_answers():
    engine = Engine(4.0, 30.0, 10.0, right=0.5)
    assert engine.run(1500) > 0.95 * SLOTS / 10.0


@pytest.mark.parametrize("rows", [1, 2, SLOTS])
def test_where_exits_pay_they_are_used(rows):
    engine = Engine(2.5, 10.0, 10.0, right=0.9, rows=rows)
    patient = Engine(2.5, 10.0, 10.0, right=0.9, rows=rows, schedule=Schedule(4, max(1, rows // 2)))
    engine.run(60 * rows)
    assert engine.run(1000) > 0.97 * patient.run(1000)
    assert engine.run(500) > 1.2 * rows / 10.0


def test_where_exits_pay_little_is_lost_before_that_is_known():
    """At the photo model's costs and rates, over as many tokens as 64 captions have."""
    costs, shares = {"rate": 0.84, "right": 0.55, "more": 1.2, "length": 12}, []
    for seed in range(3):
        engine = Engine(20.0, 45.0, 73.0, **costs)
        patient = Engine(20.0, 45.0, 73.0, **costs, schedule=Schedule.of(SLOTS))
        engine.draw, patient.draw = random.Random(seed), random.Random(seed)
        shares.append(engine.run(750) / patient.run(750))
    assert sum(shares) / 3 > 0.95


def test_a_shorter_wait_is_found_though_no_deep_call_was_so_small():
    costs = {"right": 0.7, "more": 1.2}
    engine = Engine(20.0, 45.0, 73.0, **costs)
    hasty = Engine(20.0, 45.0, 73.0, **costs, schedule=Schedule(2, 4))
    assert engine.run(1500) > 0.95 * hasty.run(1500)


def test_rows_that_may_exit_are_never_much_slower_than_synchronous_steps():
    engine = Engine(4.0, 30.0, 10.0, rate=0.01, right=0.3)
    engine.run(500)
    assert engine.run(5000) > 0.97 * SLOTS / (10.0 * (1 + LOOK))
    assert not engine.pace.exits_pay  # such a request is answered by the full model


@pytest.mark.parametrize("before", [30.0, 3.0])
def test_it_is_found_out_when_calls_take_less_or_longer(before):
    after = 33.0 - before
    engine, other = (Engine(2.0, deep, 10.0, right=0.9) for deep in (before, after))
    engine.run(2000)
    engine.took["deep"] = after
    engine.run(15000)
    other.run(1000)
    assert engine.run(1000) > 0.95 * other.run(1000)


def test_it_is_found_out_when_the_exits_do_better():
    engine = Engine(2.0, 20.0, 10.0, right=0.1)
    assert engine.run(1000) < 1.0 * SLOTS / 10.0
    engine.run(1000)
    engine.right = 0.95
    engine.run(20000)
    assert engine.run(1000) > 1.2 * SLOTS / 10.0


def test_the_deep_layers_wait_longer_where_guesses_hold():
    patient, hasty = (Engine(1.0, 10.0, 12.0, rate=0.5, right=right) for right in (0.99, 0.3))
    for engine in (patient, hasty):
        engine.run(3000)
    assert patient.pace.schedule.patience > hasty.pace.schedule.patience


def test_a_schedule_that_was_given_stays_and_exits_are_used():
    engine = Engine(4.0, 60.0, 10.0, schedule=Schedule(3, 2))
    engine.run(2000)
    assert engine.pace.schedule == Schedule(3, 2)
    assert set(engine.calls) == {"shallow", "deep"}


def test_rows_go_on_exactly_where_full_depth_takes_over(backbone, exits, batch, monkeypatch):
    """All kinds of rows, while what the engine does changes all the time."""
    small = {"WARM": 2, "EVERY": 5, "SHARE": 0.3, "ENOUGH": 4, "LOOK": 3, "_SIMULATED": 40}
    for name, value in small.items():
        monkeypatch.setattr(pace_module, name, value)
    whole, policy = backbone(NAME), ExitPolicy({2: 0.05})
    rows = [one_row(NAME, batch(NAME, 4), row) for row in range(4)]
    tick = iter(range(1_000_000))
    engine = EngineCore(
        whole, exits(NAME), policy, EngineConfig(slots=3, limit=64), clock=lambda: next(tick)
    )
    options = {"max_new_tokens": 12, "do_sample": False}
    policies = {"lossless": ExitPolicy(), "early_exit": policy, "full": ExitPolicy()}
    modes = [*["early_exit"] * 6, *["lossless"] * 6, *policies]
    asked = [engine.add(Request(rows[i % 4], m, options=options)) for i, m in enumerate(modes)]
    engine.run()
    assert min(engine.calls.values()) > 0  # it did change
    for i, (mode, handle) in enumerate(zip(modes, asked, strict=True)):
        alone = generate(whole, rows[i % 4], exits=exits(NAME), policy=policies[mode], **options)
        given = handle.result().output
        assert torch.equal(given.sequences, alone.sequences)
        if mode == "early_exit":
            assert torch.equal(given.depths, alone.depths)
            assert torch.allclose(given.scores, alone.scores, atol=1e-4, equal_nan=True)


def test_a_request_of_no_mode_gets_the_full_models_tokens_where_exits_do_not_pay(
    backbone, exits, batch
):
    whole, row, policy = backbone(NAME), one_row(NAME, batch(NAME, 1), 0), ExitPolicy({2: 0.05})
    engine = EngineCore(whole, exits(NAME), policy, EngineConfig(slots=2, limit=64))
    options = {"max_new_tokens": 9, "do_sample": False}
    for pays in (True, False):
        engine.pace.exits_pay = pays
        handle = engine.add(Request(row, options=options))
        engine.run()
        own = policy if pays else ExitPolicy()
        alone = generate(whole, row, exits=exits(NAME), policy=own, **options)
        assert torch.equal(handle.result().output.sequences, alone.sequences)
        assert handle.result().early_exit is pays
