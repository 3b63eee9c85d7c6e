"""Laws of the pace: exits that do not pay are left alone, and what changed is found out."""

from __future__ import annotations

import time
from functools import partial
from itertools import cycle
from random import Random

import families
import pytest
import torch
from families import one_row

from offramp.engine.decoding import pace as pace_module
from offramp.engine.decoding.pace import DraftPace, Pace, Turn, clock_on
from offramp.engine.decoding.scheduler import Schedule
from offramp.engine.generate import generate
from offramp.engine.policy import FULL, ExitPolicy
from offramp.models.exits import Exits
from offramp.serving.core import EngineCore
from offramp.serving.engine_config import EngineConfig
from offramp.serving.request import Request

NAME = "blip2-opt"
SLOTS = 8


@pytest.fixture(autouse=True)
def drafts_pay():
    """As far as they do."""


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


class Answers:
    """Lossless answers of `length` tokens under a pace. A turn at full depth takes a second; one of
    drafts takes `round` seconds and settles `kept` tokens more, or draws how many, as far as the
    answer goes. Its call is over each of `lengths` in turn, which takes `making` seconds more where
    there was none of that length."""

    def __init__(self, round, kept, lengths=(4,), making=0.0):
        self.round, self.kept, self.now, self.rows = round, kept, 0.0, 1
        self.lengths, self.making, self.made = cycle(lengths), making, set()
        self.pace = DraftPace(lambda: self.now)

    def run(self, answers, length):
        """Of full depth's speed, that of so many answers, their first tokens left out."""
        began = self.now
        for _ in range(answers):
            left = length - 1
            while left > 0:
                turn, begin = Turn(self.rows, first=left == length - 1), self.now
                drafted = self.pace.drafts(turn)
                kept = self.kept() if callable(self.kept) else self.kept
                written = min(left, 1 + kept * drafted)
                call = ("feed", next(self.lengths)) if drafted else ("full", 1)
                self.now += self.round if drafted else 1.0
                self.now += self.making if call not in self.made else 0.0
                self.made.add(call)
                left -= written
                tokens = written * self.rows
                took = self.now - begin
                self.pace.note(turn, tokens, took, drafted=drafted, calls={call})
        return answers * (length - 1) / (self.now - began)


@pytest.mark.parametrize("round", [1.1, 1.8])
def test_answers_of_one_word_are_soon_written_at_full_depth(round):
    answers = Answers(round, kept=4)
    answers.run(21, length=2)  # of which four were trials
    assert answers.run(100, length=2) == pytest.approx(1.0)
    assert answers.run(4000, length=2) > 0.98


@pytest.mark.parametrize("kept", [0, 0.5])
def test_drafts_that_are_right_too_seldom_are_left_out_anywhere(kept):
    answers = Answers(1.8, kept)
    answers.run(8, length=12)
    assert answers.run(500, length=12) > 0.97


def test_a_few_rounds_of_bad_luck_are_not_the_end_of_drafts_that_pay():
    """Of rounds that settle from one token to six and are 1.4 times as fast as full depth."""
    speeds = []
    for seed in range(40):
        answers = Answers(2.5, partial(Random(seed).choice, (0, 0, 1, 4, 5, 5)))
        for _ in range(60):
            speeds.append(answers.run(1, length=13))
    assert sum(speeds) / len(speeds) > 1.25


def test_what_takes_long_the_first_time_is_not_held_against_drafts():
    answers = Answers(30.0, kept=3)
    answers.run(1, length=5)
    answers.round = 1.8
    assert answers.run(200, length=13) > 0.97 * 4 / 1.8


def test_what_is_made_once_for_each_length_is_not_either():
    """As code is of a layer over so many tokens."""
    answers = Answers(1.8, 3, lengths=(5, 4, 6, 3, 2, 6), making=30.0)
    answers.run(3, length=13)
    assert answers.run(200, length=13) > 0.97 * 4 / 1.8


@pytest.mark.parametrize("rows", [1, 2])
def test_the_calls_of_every_turn_are_told(rows, backbone, batch, monkeypatch):
    """Of answers that are written at once too, and not by a batch engine's loop."""
    whole, told, note = backbone(NAME), [], DraftPace.note
    policy = ExitPolicy(lossless=True, drafts={2: 0.0}, max_draft=3)

    def heard(self, *turn, calls, **more):
        told.append(calls)
        note(self, *turn, calls=calls, **more)

    monkeypatch.setattr(DraftPace, "note", heard)
    generate(
        whole, batch(NAME, rows), exits=Exits(whole, (2,)), policy=policy, pace=DraftPace(),
        max_new_tokens=9, do_sample=False,
    )  # fmt: skip
    assert told and all(told)
    assert {kind for calls in told for kind, _ in calls} <= {"feed", "deep", "flush", "full"}


def test_drafts_that_pay_are_made_and_trials_take_a_hundredth():
    assert Answers(1.8, kept=3).run(200, length=13) > 0.97 * 4 / 1.8


def test_several_rows_are_judged_by_themselves():
    """What one call over all of them costs, one of a single row does not tell."""
    answers = Answers(1.8, kept=3)
    assert answers.run(200, length=13) > 0.97 * 4 / 1.8
    answers.rows, answers.round = 4, 4.5
    answers.run(8, length=13)
    assert answers.run(500, length=13) > 0.97
    answers.rows, answers.round = 1, 1.8
    assert answers.run(20, length=13) > 0.97 * 4 / 1.8


def test_behind_one_words_an_answer_that_goes_on_is_drafted():
    answers = Answers(1.8, kept=3)
    answers.run(100, length=2)
    assert answers.run(1, length=14) == pytest.approx(13 / (1 + 3 * 1.8))
    answers.run(400, length=14)  # and in the end behind first tokens too
    assert answers.run(20, length=13) > 0.97 * 4 / 1.8


@pytest.mark.parametrize("kind", ["layer", "drafting"])
@pytest.mark.parametrize("name", ["llava", "blip2-opt", "blip2-t5"])
def test_where_drafts_do_not_pay_the_decoder_runs_full_depth_and_says_so(
    kind, name, backbone, batch, caplog
):
    """By a clock that counts layers: drafts of exits as they were made are never all right."""
    whole, policy = backbone(name), ExitPolicy(lossless=True, drafts={2: 0.0}, max_draft=3)
    parts, now = Exits(whole, (2,), kind=kind), [0]
    layers = [*whole.layers, parts.at(2)]
    handles = [
        layer.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 1)) for layer in layers
    ]
    pace = DraftPace(lambda: now[0])
    options = {"max_new_tokens": 9, "do_sample": False}
    try:
        for turn in range(18):
            row = one_row(name, batch(name, 4), turn % 4)
            full = generate(whole, row, **options)
            made = generate(whole, row, exits=parts, policy=policy, pace=pace, **options)
            assert torch.equal(made.sequences, full.sequences)
        now[0] = 0
        generate(whole, row, **options)
        took, now[0] = now[0], 0
        made = generate(whole, row, exits=parts, policy=policy, pace=pace, **options)
    finally:
        for handle in handles:
            handle.remove()
    told = sum("do not pay" in message for message in caplog.messages)
    assert made.rounds == () and made.undrafted == 8 and told == 2
    assert now[0] - took <= 1 + 8  # of the exit, whose keys are stored, if not by a call


@pytest.mark.parametrize("kind", ["layer", "drafting"])
def test_answers_are_the_same_while_drafts_come_and_go(kind, backbone, batch):
    whole, policy = backbone(NAME), ExitPolicy(lossless=True, drafts={2: 0.0}, max_draft=3)
    parts, options = Exits(whole, (2,), kind=kind), {"max_new_tokens": 9, "do_sample": False}
    pace, drawn = DraftPace(), Random(0)
    pace.drafts = lambda turn: drawn.random() < 0.5
    undrafted = 0
    for rows in (1, 1, 1, 3, 3):
        full = generate(whole, batch(NAME, rows), **options)
        made = generate(whole, batch(NAME, rows), exits=parts, policy=policy, pace=pace, **options)
        assert torch.equal(made.sequences, full.sequences) and made.rounds
        undrafted += made.undrafted
    assert undrafted > 0


def test_single_answers_are_timed_by_the_thread_where_the_processor_computes():
    """Whatever else a machine does: on a busy one drafts that paid were left out."""
    assert clock_on("cpu") is time.thread_time and clock_on("cuda") is time.perf_counter
    assert DraftPace().clock is time.thread_time


def test_where_full_depth_cannot_be_tried_what_waits_goes_on_waiting(
    backbone, exits, batch, monkeypatch
):
    whole = backbone("blip2-opt")
    monkeypatch.setattr(whole, "engine", "stack")  # whose states would have moved on
    core = EngineCore(whole, exits("blip2-opt"), ExitPolicy({2: 0.0}), EngineConfig(2, 64))
    options = {"max_new_tokens": 30, "do_sample": False}
    handle = core.add(Request(batch("blip2-opt", 1), "early_exit", options=options))
    core.run()
    assert handle.result().output.depths.max() == 2
    assert core.calls["feed"] == 29 and core.calls["flush"] == core.calls["trial"] == 0


@pytest.mark.parametrize("threshold", [0.0, 0.04])
@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "llava", "qwen2.5-vl", "gemma3"])
def test_what_waits_goes_on_waiting_while_full_depth_is_tried(
    name, threshold, backbone, exits, batch, monkeypatch
):
    """Prompts too: a trial once took all that waited through the deep layers."""
    for constant, value in {"WARM": 2, "SHARE": 0.5}.items():
        monkeypatch.setattr(pace_module, constant, value)
    whole, depth = backbone(name), families.depths(name)[0]
    policy, tick = ExitPolicy({depth: threshold}), iter(range(1_000_000))
    options = {"max_new_tokens": 12, "do_sample": False}
    rows = [one_row(name, batch(name, 3), row) for row in range(3)]
    core = EngineCore(
        whole, exits(name), policy, EngineConfig(slots=3, limit=64), clock=lambda: next(tick)
    )
    handles = [core.add(Request(row, "early_exit", options=options)) for row in rows]
    core.run()
    assert core.calls["trial"] > 1 and core.calls["flush"] == 0
    for row, handle in zip(rows, handles, strict=True):
        given = handle.result().output
        alone = generate(whole, row, exits=exits(name), policy=policy, **options)
        assert torch.equal(given.sequences, alone.sequences)
        assert torch.equal(given.depths, alone.depths)
        assert threshold or given.depths[0, 1:].max() == depth
