"""Laws of the chain: each segment gets every token once, in order, whoever left where."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from offramp_llama_cpp.chain import CallSizes, SegmentChain
from offramp_llama_cpp.prompt import Prompt


class FakeTap:
    def __init__(self) -> None:
        self.stop = False
        self.held = np.zeros((0, 2), dtype=np.float32)


class FakeSegment:
    """Adds up what it was fed: a row's state depends on all rows before it."""

    def __init__(self, taps: bool) -> None:
        self.tap = FakeTap() if taps else None
        self.fed: list[Any] = []
        self.calls: list[int] = []
        self.outputs: list[int] = []
        self.last: Any = None
        self.ahead: list[bool] = []
        self.at_once = 512
        self.sequences = 1

    @property
    def length(self) -> int:
        return len(self.fed)

    def length_of(self, slot: int) -> int:
        return len(self.fed)

    def begin(self, prompt: Any = None, slot: int = 0, kept: int = 0) -> None:
        self.fed = self.fed[:kept]

    def tapped(self) -> Any:
        assert self.tap is not None
        return self.tap.held.copy()

    def feed(
        self, states: Any, outputs: int, idle: int = 0, *, ahead: bool = False, slot: int = 0
    ) -> None:
        assert 0 <= outputs <= len(states) - idle
        self.ahead.append(ahead)
        self.calls.append(len(states))
        self.outputs.append(outputs)
        self.fed += list(states)
        sums = np.cumsum(np.array(self.fed), 0)[-len(states) :].astype(np.float32)
        if self.tap is not None:
            self.tap.held = sums
        self.last = sums[len(sums) - idle - outputs : len(sums) - idle]
        self.crop(idle)

    def logits(self, rows: int) -> Any:
        assert rows == len(self.last)
        return self.last

    def crop(self, rows: int, slot: int = 0) -> None:
        self.fed = self.fed[: len(self.fed) - rows]


def chain_of(segments: int, least: int = 1, most: int = 4, **seconds: float) -> SegmentChain:
    sizes = CallSizes(least, most, {int(rows[1:]): value for rows, value in seconds.items()})
    return SegmentChain([FakeSegment(i < segments - 1) for i in range(segments)], sizes)  # type: ignore[misc]


PROMPT = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0], [9.0, 10.0]], dtype=np.float32)
TOKENS = np.arange(30, dtype=np.float32).reshape(15, 2)


def random_exits(seed: int) -> Any:
    draw = np.random.default_rng(seed)
    return lambda exit, state, logits: bool(draw.random() < 0.6)


@pytest.mark.parametrize(("least", "most"), [(1, 4), (2, 4), (1, 9)])
@pytest.mark.parametrize("segments", [2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_segments_get_every_token_in_order(segments: int, seed: int, least: int, most: int) -> None:
    plain, ours = chain_of(segments), chain_of(segments, least, most)
    decide = random_exits(seed)
    for chain in (plain, ours):
        chain.run(PROMPT)
        chain.finish(1)
    for token in TOKENS:
        plain.run(token[None])
        expected = plain.finish(1)
        if ours.run(token[None], decide) == segments - 1:
            assert np.array_equal(ours.finish(1), expected)
    if ours.waits():
        assert np.array_equal(ours.finish(1), expected)
    for one, other in zip(plain.segments, ours.segments, strict=True):
        assert np.array_equal(one.fed, other.fed)  # type: ignore[attr-defined]


def test_calls_are_no_longer_than_is_exact() -> None:
    chain = chain_of(2)
    chain.run(PROMPT, lambda *_: True)
    for token in TOKENS:
        chain.run(token[None], lambda *_: True)
    chain.finish(1)
    assert chain.segments[1].calls == [5, 4, 4, 4, 3]  # type: ignore[attr-defined]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(("most", "calls"), [(7, [5, 3]), (8, [8]), (20, [8])])
def test_a_short_prompt_shares_a_call_with_what_waits_behind_it(
    most: int, calls: list[int], together: bool
) -> None:
    chain = chain_of(2, most=most)
    chain.run(PROMPT, lambda *_: True)
    for tokens in [TOKENS[:3]] if together else TOKENS[:3, None]:
        chain.run(tokens, lambda *_: True)
    expected = np.cumsum(np.cumsum([*PROMPT, *TOKENS[:3]], 0), 0)[-2:]
    assert np.array_equal(chain.finish(2), expected)
    assert chain.segments[1].calls == calls  # type: ignore[attr-defined]


def test_a_call_has_as_many_rows_as_it_takes_above_the_first_exit() -> None:
    chain = chain_of(3, least=2)
    chain.run(PROMPT)
    chain.finish(1)
    for token in TOKENS:
        chain.run(token[None])
        chain.finish(1)
    assert [set(each.calls) for each in chain.segments] == [{5, 1}, {5, 2}, {5, 2}]  # type: ignore[attr-defined]


def test_what_goes_on_alone_is_fed_once_where_rounding_may_differ() -> None:
    chain = chain_of(2, least=2)
    chain.reset(exact=False)
    for token, exits in zip(TOKENS[:4], (False, True, True, False), strict=True):
        if chain.run(token[None], lambda *_, exits=exits: exits) == 1:
            chain.finish(1)
    assert chain.segments[1].calls == [1, 3]  # type: ignore[attr-defined]


def test_pending_tokens_share_calls_where_that_is_quicker() -> None:
    calls = {}
    for pending in range(1, 8):
        chain = chain_of(2, most=6, r1=2.0, r2=5.0, r3=7.0, r6=7.5)  # alone: 2, 4, 6, ...
        for token in TOKENS[:pending]:
            chain.run(token[None], lambda *_: True)
        assert np.array_equal(chain.finish(1)[0], np.cumsum(np.cumsum(TOKENS, 0), 0)[pending - 1])
        calls[pending] = chain.segments[1].calls  # type: ignore[attr-defined]
        assert chain.segments[1].outputs == [0] * (len(calls[pending]) - 1) + [1]  # type: ignore[attr-defined]
    assert calls[2] == [1, 1] and calls[3] == [1, 1, 1]
    assert calls[4] == [4] and calls[6] == [6] and calls[7] == [6, 1]


def test_rows_are_free_as_far_as_their_call_takes_little_longer() -> None:
    took = {1: 2.6, 2: 2.4, 4: 2.9, 8: 2.8, 16: 4.8, 32: 8.9}  # milliseconds
    assert CallSizes(1, 48, took).free == 8
    assert CallSizes(1, 48, {1: 1.0, 2: 2.0}).free == 1
    assert CallSizes(1, 48, took, shared=False).free is None  # no sequence is in another's call
    assert CallSizes(1, 48).free is None


@pytest.mark.parametrize("outputs", [1, 3, 7, 15])
def test_logits_are_of_the_last_tokens_however_the_calls_fall(outputs: int) -> None:
    plain, ours = chain_of(3), chain_of(3)
    for chain in (plain, ours):
        chain.run(PROMPT)
        chain.finish(1)
    expected = []
    for token in TOKENS:
        plain.run(token[None])
        expected.append(plain.finish(1)[0])
        ours.run(token[None], random_exits(int(token[0])))
    assert np.array_equal(ours.finish(outputs), np.array(expected)[-outputs:])


def test_what_is_taken_back_leaves_no_trace() -> None:
    chain, other = chain_of(3), chain_of(3)
    for each, tokens in ((chain, TOKENS), (other, TOKENS[:10])):
        each.run(PROMPT)
        each.finish(1)
        for token in tokens:
            each.run(token[None], random_exits(1))
        each.finish(1)
    chain.crop(5)
    for one, two in zip(chain.segments, other.segments, strict=True):
        assert np.array_equal(one.fed, two.fed)  # type: ignore[attr-defined]


@pytest.mark.parametrize("rows", range(8))
def test_what_waits_is_taken_back_too(rows: int) -> None:
    chain, other = chain_of(3), chain_of(3)
    for each, tokens in ((chain, TOKENS[:12]), (other, TOKENS[: 12 - rows])):
        each.run(PROMPT, lambda *_: True)
        for number, token in enumerate(tokens):
            each.run(token[None], lambda exit, *_, at=number % 2: exit == at)
            if number == 3:
                each.finish(1)
    assert chain.waits() and chain.tokens() == other.tokens() + rows
    chain.crop(rows)
    assert chain.tokens() == other.tokens()
    for each in (chain, other):
        each.run(TOKENS[-1:])
    assert np.array_equal(chain.finish(6), other.finish(6))
    for one, two in zip(chain.segments, other.segments, strict=True):
        assert np.array_equal(one.fed, two.fed)  # type: ignore[attr-defined]


@pytest.mark.parametrize("outputs", [0, 1, 4, 7])
def test_an_exit_gives_states_of_all_and_logits_of_the_last(outputs: int) -> None:
    chain, plain = chain_of(3, most=3), chain_of(3)
    for token in TOKENS[:7]:
        chain.run(token[None], lambda *_: True)
        plain.run(token[None])
    states, logits = chain.advance(1, outputs)
    assert np.array_equal(states, np.cumsum(np.cumsum(TOKENS[:7], 0), 0))
    assert np.array_equal(logits, states[7 - outputs :])
    assert np.array_equal(chain.finish(7), plain.finish(7))


def test_the_exit_sees_the_new_token_not_those_that_waited() -> None:
    chain, seen = chain_of(3), list[float]()
    leaves: Iterator[bool] = iter([False, True, False, True])

    def decide(exit: int, state: Any, logits: Any) -> bool:
        if exit == 1:
            seen.append(float(state[0]))
        return next(leaves)

    chain.run(np.array([[1.0, 0.0]], dtype=np.float32), decide)
    chain.run(np.array([[2.0, 0.0]], dtype=np.float32), decide)
    assert seen == [1.0, 1.0 + 3.0]


def test_unused_exits_end_their_segments_early() -> None:
    chain = chain_of(3)
    chain.reset(unused=(1,))
    assert [segment.tap.stop for segment in chain.segments[:2]] == [False, True]  # type: ignore[union-attr]
    chain.reset()
    assert not chain.segments[1].tap.stop  # type: ignore[union-attr]


def test_a_prompt_is_cut_at_what_looks_ahead() -> None:
    chain = chain_of(2)
    for segment in chain.segments:
        segment.at_once = 3
    states = np.ones((20, 2), dtype=np.float32)
    prompt = Prompt(states, ahead=((4, 9), (9, 11), (16, 20)))
    chain.reset(prompt=prompt)
    chain.run(states)
    chain.finish(1)
    calls = [(3, False), (1, False), (5, True), (2, True), (3, False), (2, False), (4, True)]
    for segment in chain.segments:
        assert list(zip(segment.calls, segment.ahead, strict=True)) == calls  # type: ignore[attr-defined]


def test_text_goes_on_behind_the_largest_position() -> None:
    positions = np.array([[0, 1, 1, 1, 1, 3]] * 4, dtype=np.int32)
    positions[1:3, 1:5] = [[1, 1, 2, 2], [1, 2, 1, 5]]
    table = Prompt(np.ones((6, 2), dtype=np.float32), positions).table(4, 9)
    assert np.array_equal(table[:, :6], positions)
    assert np.array_equal(table[:, 6:], [[6, 7, 8]] * 4)
