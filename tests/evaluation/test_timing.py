"""Laws of the stopwatch."""

import itertools
from collections import Counter

import torch
from transformers import StoppingCriteriaList

from offramp.evaluation.timing import Timing, speedup, speedup_interval, speedups, time_interleaved


class Clock:
    """A clock that advances only when a way says it worked."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def way(clock: Clock, calls: list[str], name: str, first: float, each: float, tokens: int):  # type: ignore[no-untyped-def]
    def run(_, stop: StoppingCriteriaList) -> torch.Tensor:  # type: ignore[no-untyped-def]
        calls.append(name)
        ids = torch.zeros(1, 0, dtype=torch.long)
        for step in range(tokens):
            clock.now += first if step == 0 else each
            ids = torch.cat([ids, torch.ones(1, 1, dtype=torch.long)], 1)
            if len(stop):
                stop(ids, None)
        return ids[0]

    return run


def test_decode_time_is_what_follows_the_first_token() -> None:
    clock = Clock()
    ways = {
        "slow": way(clock, [], "slow", 5.0, 2.0, 4),
        "fast": way(clock, [], "fast", 5.0, 1.0, 4),
    }
    timings = time_interleaved(ways, [{}, {}], rounds=3, clock=clock)
    assert timings["slow"].decode == [12.0] * 3
    assert timings["slow"].seconds == [22.0] * 3
    assert speedup(timings["slow"].decode, timings["fast"].decode) == 2.0


def test_drafts_that_share_the_prompts_call_count_as_decoding() -> None:
    """A first call that writes three tokens and takes 4 more than full depth's is no speedup of
    decoding without bounds."""
    clock = Clock()

    def drafting(_: object, stop: StoppingCriteriaList) -> torch.Tensor:
        clock.now += 9.0
        ids = torch.ones(1, 3, dtype=torch.long)
        if len(stop):
            stop(ids, None)
        clock.now += 1.0
        return torch.ones(4, dtype=torch.long)

    full = way(clock, [], "full", 5.0, 2.0, 4)
    sooner = way(clock, [], "sooner", 3.0, 2.0, 4)
    ways = {"drafting": drafting, "sooner": sooner, "full": full}
    drafts = ("drafting", "sooner")
    timings = time_interleaved(ways, [{}, {}], rounds=3, clock=clock, drafting=drafts)
    assert timings["full"].decode == [12.0] * 3
    assert timings["drafting"].decode == [10.0] * 3  # 5 an answer, after full depth's first token
    assert timings["drafting"].by_example == [[5.0, 5.0]] * 3
    assert timings["drafting"].seconds == [20.0] * 3
    assert timings["sooner"].decode == [12.0] * 3  # a prompt that is read faster is no decoding


def test_tokens_per_second_counts_decoded_tokens_only() -> None:
    clock = Clock()
    timing = time_interleaved(
        {"a": way(clock, [], "a", 5.0, 2.0, 4)}, [{}, {}], rounds=1, clock=clock
    )["a"]
    assert timing.tokens == 8
    assert timing.tokens_per_second == 6 / 12.0


def test_ways_are_interleaved_and_none_keeps_its_place_or_its_neighbour() -> None:
    clock = Clock()
    calls: list[str] = []
    ways = {name: way(clock, calls, name, 1.0, 1.0, 2) for name in "abc"}
    time_interleaved(ways, [{}] * 150, rounds=2, clock=clock)
    timed = calls[3 * 3 :]  # after the warm-up
    turns = [timed[i : i + 3] for i in range(0, len(timed), 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    firsts = Counter(turn[0] for turn in turns)
    assert all(70 < firsts[name] < 130 for name in "abc")  # of 300, a third each
    behind = Counter(pair for turn in turns for pair in itertools.pairwise(turn))
    assert all(70 < behind[a, b] < 130 for a, b in itertools.permutations("abc", 2))


def test_the_interval_of_a_speedup_is_over_examples_in_pairs() -> None:
    slow = Timing(by_example=[[2.0, 4.0, 8.0], [2.0, 4.0, 8.0]])
    twice = Timing(by_example=[[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    assert speedup_interval(slow, twice) == (2.0, 2.0)
    some = Timing(by_example=[[1.0, 4.0, 8.0]] * 2)
    low, high = speedup_interval(slow, some)
    assert low == 1.0 and 1.0 < high <= 2.0
    assert speedup_interval(Timing(by_example=[[2.0]]), Timing(by_example=[[1.0]])) is None


def test_speedups_are_of_the_same_seconds_that_an_answer_is_said_to_take() -> None:
    clock = Clock()
    ways = {
        "generate": way(clock, [], "generate", 6.0, 3.0, 4),
        "full": way(clock, [], "full", 5.0, 2.0, 4),
        "ours": way(clock, [], "ours", 5.0, 1.0, 4),
    }
    timings = time_interleaved(ways, [{}, {}], rounds=3, clock=clock)
    found = speedups(timings, "ours")
    assert found["seconds_an_answer"] == 8.0
    assert found["seconds_an_answer_full"] == 11.0
    assert found["speedup_end_to_end"] == 11.0 / 8.0
    assert (found["speedup_decode"], found["speedup_decode_interval"]) == (2.0, (2.0, 2.0))
    assert (found["speedup_vs_generate"], found["speedup_vs_generate_end_to_end"]) == (3.0, 15 / 8)
    del timings["generate"]
    assert "speedup_vs_generate" not in speedups(timings, "ours")
