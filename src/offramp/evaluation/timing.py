"""Wall-clock comparison of generation methods: interleaved, free-running, batch 1.

Each example is answered by every method in turn, in an order that is drawn anew each time: drift of
the machine falls on all alike, and none always comes behind one that leaves its weights in the
processor's cache. A round is one pass over all examples; figures are medians of rounds.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from offramp.engine.generate import generate
from offramp.engine.policy import FULL, ExitPolicy
from offramp.models.backbone import Backbone
from offramp.models.exits import Exits, ExitSet

GenerateFn = Callable[[Mapping[str, Any], StoppingCriteriaList], Tensor]
"""Generates from processor output, batch 1, with these stopping criteria; returns new ids [N]."""


class FirstToken(StoppingCriteria):
    """Stops nothing; notes when the first token was there: what follows is decoding alone.

    clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: float | None = None
        self._clock = clock

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if self.seconds is None:
            self.seconds = self._clock()
            self._none = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return self._none


@dataclass
class Timing:
    """Seconds of each round, summed over examples, and the tokens written in one round.

    seconds: from processor output to the last token. decode: from the first token to the last.
    answers: new token ids of each example.
    """

    seconds: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    answers: list[tuple[int, ...]] = field(default_factory=list)

    def __add__(self, other: Timing) -> Timing:
        """Of the examples of both, round by round."""
        return Timing(
            [sum(both) for both in zip_longest(self.seconds, other.seconds, fillvalue=0.0)],
            [sum(both) for both in zip_longest(self.decode, other.decode, fillvalue=0.0)],
            self.answers + other.answers,
        )

    @property
    def tokens(self) -> int:
        return sum(len(answer) for answer in self.answers)

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens (all but the first of each answer) per second of decoding."""
        return (self.tokens - len(self.answers)) / median(self.decode)


def time_interleaved(
    methods: Mapping[str, GenerateFn],
    inputs: Sequence[Mapping[str, Any]],
    *,
    rounds: int = 5,
    progress: Any = iter,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time every method on every input, after one untimed pass over a few.

    clock: returns seconds; `time.thread_time` on a machine that others use too.
    """
    names = list(methods)
    for name in names:
        for prompt in inputs[:3]:
            methods[name](prompt, StoppingCriteriaList())
    timings = {name: Timing() for name in names}
    for number in progress(range(rounds)):
        total = dict.fromkeys(names, 0.0)
        decode = dict.fromkeys(names, 0.0)
        for place, prompt in enumerate(inputs):
            for name in random.Random(f"{number}:{place}").sample(names, len(names)):
                first, begin = FirstToken(clock), clock()
                answer = methods[name](prompt, StoppingCriteriaList([first]))
                end = clock()
                assert first.seconds is not None
                total[name] += end - begin
                decode[name] += end - first.seconds
                if number == 0:
                    timings[name].answers.append(tuple(answer.tolist()))
        for name in names:
            timings[name].seconds.append(total[name])
            timings[name].decode.append(decode[name])
    return timings


def speedup(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Ratio of medians."""
    return median(slow) / median(fast)


def stock_generate_fn(backbone: Backbone, **options: Any) -> GenerateFn:
    """HF's own `generate`, untouched. Rows of a batch come one behind the other."""

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
    """Generation by `policy`; without thresholds the full model, through the same loop."""

    def run(inputs: Mapping[str, Any], stop: StoppingCriteriaList) -> Tensor:
        output = generate(
            backbone, inputs, exits=exits, policy=policy,
            stopping_criteria=stop, **options,
        )  # fmt: skip
        return output.new_tokens.flatten()

    return run
