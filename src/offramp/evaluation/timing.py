"""Wall-clock comparison of generation methods: interleaved, free-running, batch 1.

Each example is answered by every method in turn, in an order that is drawn anew each time: drift of
the machine falls on all alike, and none always comes behind one that leaves its weights in the
processor's cache. A round is one pass over all examples; figures are medians of rounds.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from offramp.core.decoding.policy import FULL, ExitPolicy, GenerationOutput
from offramp.core.engine.generate import generate
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet
from offramp.evaluation.statistics import Measure, interval

GenerateFn = Callable[[Mapping[str, Any], StoppingCriteriaList], Tensor]
"""Generates from processor output, batch 1, with these stopping criteria; returns new ids [N]."""


Name = TypeVar("Name", bound=Hashable)
Input = TypeVar("Input")
Result = TypeVar("Result")


class FirstToken(StoppingCriteria):
    """A stopping criterion that never stops, and notes the time of the first token, after which
    decoding begins.

    clock: returns seconds. heard: whether the time is noted.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: float | None = None
        self._clock = clock

    @property
    def heard(self) -> bool:
        return self.seconds is not None

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if self.seconds is None:
            self.seconds = self._clock()
            self._none = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return self._none


@dataclass
class Timing:
    """Seconds of each round, summed over examples, and the tokens written in one round.

    seconds: from processor output to the last token. decode: see `decoding`. answers: new token ids
    of each example. by_example: `decode` of each example, by round.
    """

    seconds: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    answers: list[tuple[int, ...]] = field(default_factory=list)
    by_example: list[list[float]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(len(answer) for answer in self.answers)

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens (all but the first of each answer) per second of decoding."""
        return (self.tokens - len(self.answers)) / median(self.decode)

    @property
    def seconds_an_answer(self) -> float:
        """The mean seconds over examples, from processor output to the last token."""
        return median(self.seconds) / len(self.answers)


def time_interleaved(
    methods: Mapping[Name, GenerateFn],
    inputs: Sequence[Mapping[str, Any]],
    *,
    rounds: int = 5,
    progress: Any = iter,
    clock: Callable[[], float] = time.perf_counter,
    drafting: Collection[Name] = (),
) -> dict[Name, Timing]:
    """Time every method on every input, after one untimed pass over a few.

    clock: returns seconds; `time.thread_time` on a machine that others use too. drafting: names of
    methods that draft; another method is then named "full" (see `beside_full`).
    """

    runs = in_turn(
        {name: partial(timed, run, clock=clock) for name, run in methods.items()},
        inputs,
        rounds=rounds,
        warm=3,
        progress=progress,
    )
    runs = beside_full(runs, dict.fromkeys(drafting, "full"))
    return {
        name: Timing(
            [sum(whole for whole, _, _ in taken) for taken in by_round],
            [sum(decode for _, decode, _ in taken) for taken in by_round],
            [answer for _, _, answer in by_round[0]] if by_round else [],
            [[decode for _, decode, _ in taken] for taken in by_round],
        )
        for name, by_round in runs.items()
    }


def beside_full(
    runs: Mapping[Any, Sequence[Sequence[Any]]], full: Mapping[Any, Any]
) -> dict[Any, Any]:
    """Return the timings, with decoding by drafts counted as `decoding` does.

    runs: of each method by round and input, as `timed` returns them. full: by each drafting method,
    the name of its full depth.
    """
    counted = {
        name: [
            [(own[0], decoding(own, base), own[2]) for own, base in zip(*both, strict=True)]
            for both in zip(runs[name], runs[of], strict=True)
        ]
        for name, of in full.items()
    }
    return {**runs, **counted}


def decoding(own: Sequence[Any], full: Sequence[Any]) -> Any:
    """Return the seconds of decoding an answer by drafts, counted from full depth's first token,
    because drafts share the prompt's call and delay their own first token.

    own, full: (seconds of an answer, seconds after its first token), as `timed` returns them, or
    arrays; full: at full depth for the same prompt.
    """
    return np.maximum(own[1], own[0] - (full[0] - full[1]))


def timed(
    run: Callable[[Input, StoppingCriteriaList], Tensor],
    given: Input,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float, tuple[int, ...]]:
    """Return the seconds of an answer, whole and from its first token on, and its new ids [N]."""
    first, begin = FirstToken(clock), clock()
    answer = run(given, StoppingCriteriaList([first]))
    end = clock()
    assert first.seconds is not None
    return end - begin, end - first.seconds, tuple(answer.tolist())


def in_turn(
    methods: Mapping[Name, Callable[[Input], Result]],
    inputs: Sequence[Input],
    *,
    rounds: int,
    warm: int = 0,
    progress: Any = iter,
) -> dict[Name, list[list[Result]]]:
    """Return the results of every method on every input, by round: all methods answer an input
    before the next one.

    warm: inputs on which every method is tried before, uncounted.
    """
    for method in methods.values():
        for given in inputs[:warm]:
            method(given)
    found: dict[Name, list[list[Result]]] = {n: [[] for _ in range(rounds)] for n in methods}
    for number, place in progress([*product(range(rounds), range(len(inputs)))]):
        for name in random.Random(f"{number}:{place}").sample([*methods], len(methods)):
            found[name][number].append(methods[name](inputs[place]))
    return found


def speedup(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Return the ratio of two medians of seconds, slow over fast."""
    return median(slow) / median(fast)


def speedups(timings: Mapping[str, Timing], name: str) -> dict[str, Any]:
    """Return the speedups of method `name` over "full" and, where it was timed, over stock
    "generate".

    `speedup_decode` and its interval, `speedup_end_to_end`, `speedup_vs_generate` and
    `speedup_vs_generate_end_to_end`; and the seconds of a whole answer by both.
    """
    full, ours = timings["full"], timings[name]
    found: dict[str, Any] = {
        "speedup_decode": speedup(full.decode, ours.decode),
        "speedup_decode_interval": speedup_interval(full, ours),
        "speedup_end_to_end": speedup(full.seconds, ours.seconds),
        "seconds_an_answer": ours.seconds_an_answer,
        "seconds_an_answer_full": full.seconds_an_answer,
    }
    if stock := timings.get("generate"):
        found["speedup_vs_generate"] = speedup(stock.decode, ours.decode)
        found["speedup_vs_generate_end_to_end"] = speedup(stock.seconds, ours.seconds)
    return found


def speedup_interval(slow: Timing, fast: Timing) -> tuple[float, float] | None:
    """Return the 95% interval of the speedup of decoding, by a bootstrap over examples drawn in
    pairs; each example's seconds are the median of its rounds. None: fewer than two examples."""
    both = np.stack([np.median(timing.by_example, 0) for timing in (slow, fast)], 1)
    return interval(Measure(float("nan"), both))


def stock_generate_fn(backbone: Backbone, **options: Any) -> GenerateFn:
    """Return a function that generates by HF's own `generate`, one row of a batch after the
    other."""

    def run(inputs: Mapping[str, Any], stop: StoppingCriteriaList) -> Tensor:
        with torch.inference_mode():
            sequences = backbone.model.generate(**inputs, stopping_criteria=stop, **options)
        prompt = 1 if backbone.is_encoder_decoder else inputs["input_ids"].shape[1]
        return sequences[:, prompt:].flatten()  # type: ignore[no-any-return]

    return run


def exit_generate_fn(
    backbone: Backbone,
    exits: ExitSet | Exits | None = None,
    policy: ExitPolicy = FULL,
    **options: Any,
) -> GenerateFn:
    """Return a function that generates by `policy`; without thresholds by the full model, through
    the same loop."""
    return generate_fn(partial(generate, backbone, exits=exits, policy=policy), **options)


def generate_fn(
    generates: Callable[..., GenerationOutput],
    heard: Callable[[GenerationOutput], object] = lambda _: None,
    **options: Any,
) -> GenerateFn:
    """Return a function that generates by `generates`, of an adapter or a runtime. heard: is called
    with each output."""

    def run(inputs: Mapping[str, Any], stop: StoppingCriteriaList) -> Tensor:
        output = generates(inputs, stopping_criteria=stop, **options)
        heard(output)
        return output.new_tokens.flatten()

    return run


def clock_on(device: str) -> Callable[[], float]:
    """Return a clock, in seconds, of the computation on a kind of device for the current thread."""
    fine = time.get_clock_info("thread_time").resolution < 1e-4
    return time.thread_time if device == "cpu" and fine else time.perf_counter
