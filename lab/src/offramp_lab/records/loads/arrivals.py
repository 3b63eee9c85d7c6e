"""Requests that come when they like and want answers of any length: the engine at full depth
against static batches, no exits on either side.

A static batch waits until as many requests are there as it has rows, and runs until the last of
them is answered, through Hugging Face's `generate`. Both serve the same Poisson arrivals, at a rate
of --load times what the engine can take; seconds in which nothing is there to do are skipped. Adds
"arrivals" to the shape's entry in lab/records/engine.json. Random weights; one thread, a
quiet machine; three minutes for smollm2-135m in bfloat16.

--cpu-time: seconds of the thread, not of the clock, for a machine that others use too.
"""

import argparse
import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from statistics import mean, median
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from offramp.engine.decoding.sequence import Token
from offramp.engine.self_check import prove
from offramp.evaluation.scripted_exits import OPTIONS
from offramp.models.backbone import Backbone
from offramp.models.exits import Exits, ExitSet
from offramp.serving.core import EngineCore
from offramp.serving.engine_config import EngineConfig
from offramp.serving.request import Request
from offramp_lab.experiments.benchmark.engine_bench import static_batch
from offramp_lab.experiments.benchmark.simulator import quantiles
from offramp_lab.experiments.benchmark.unit_costs import CallCosts, measure_calls, seconds
from offramp_lab.experiments.experiment import Experiment, machine
from offramp_lab.inputs.shapes import shape
from offramp_lab.records.engine import add_to_record
from offramp_lab.records.record import asked, named

Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Arrival:
    """When a request comes, in seconds, and how many tokens its answer has."""

    at: float
    length: int


@dataclass
class Outcome:
    """seconds: from the first arrival to the last token. firsts, totals: from each request's
    arrival to its first token and to its last. gaps: between the tokens of an answer. steps: calls
    that decoded."""

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    firsts: list[float] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    @property
    def busy(self) -> float:
        """Rows that a step wrote for, on average; a prompt writes each first token."""
        return (self.tokens - len(self.totals)) / self.steps

    def note(self, at: float, times: Sequence[float]) -> None:
        """An answer to what came at `at`, its tokens given out at `times`."""
        self.tokens += len(times)
        self.firsts.append(times[0] - at)
        self.totals.append(times[-1] - at)
        self.gaps += [b - a for a, b in pairwise(times)]
        self.seconds = max(self.seconds, times[-1])


class Clock:
    """Seconds since it was made. wait: for nothing to happen, at no cost."""

    def __init__(self, work: Callable[[], float] = time.perf_counter) -> None:
        self._work, self._skipped = work, -work()

    def __call__(self) -> float:
        return self._work() + self._skipped

    def wait(self, until: float) -> None:
        self._skipped += max(0.0, until - self())


def poisson(rate: float, count: int, lengths: tuple[int, int], seed: int) -> list[Arrival]:
    """`count` requests at `rate` a second, with answers of lengths drawn alike; the first at 0."""
    draw, now, found = random.Random(seed), 0.0, []
    for _ in range(count):
        found.append(Arrival(now, draw.randint(*lengths)))
        now += draw.expovariate(rate)
    return found


# -- the two ways ----------------------------------------------------------------------------------


class _Lengths(StoppingCriteria):
    """Ends each row at its length, and notes when each token was there."""

    def __init__(self, prompt: int, lengths: Sequence[int], clock: Clock) -> None:
        self._lengths = prompt + torch.tensor(lengths)
        self._clock, self.times = clock, list[float]()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(self._clock())
        return self._lengths <= input_ids.shape[1]


def in_static_batches(
    backbone: Backbone, inputs: Inputs, arrivals: Sequence[Arrival], slots: int, clock: Clock
) -> Outcome:
    """As many as there are slots at once; tokens are given out as they come."""
    outcome = Outcome()
    for begin in range(0, len(arrivals), slots):
        batch = arrivals[begin : begin + slots]
        clock.wait(batch[-1].at)
        rows = {name: torch.cat([value] * len(batch)) for name, value in inputs.items()}
        lengths = [arrival.length for arrival in batch]
        watch = _Lengths(inputs["input_ids"].shape[1], lengths, clock)
        options = {**OPTIONS, "max_new_tokens": max(lengths), "pad_token_id": 0}
        backbone.model.generate(**rows, stopping_criteria=StoppingCriteriaList([watch]), **options)
        for arrival in batch:
            outcome.note(arrival.at, watch.times[: arrival.length])
        outcome.steps += max(lengths) - 1
    return outcome


def in_the_engine(
    core: EngineCore, inputs: Inputs, arrivals: Sequence[Arrival], clock: Clock
) -> Outcome:
    """Each as soon as a slot is free."""

    def note(times: list[float], _: Token) -> None:
        times.append(clock())

    outcome, coming = Outcome(), deque(arrivals)
    times: dict[Arrival, list[float]] = {arrival: [] for arrival in arrivals}
    while coming or not core.idle:
        while coming and coming[0].at <= clock():
            arrival = coming.popleft()
            options = {**OPTIONS, "max_new_tokens": arrival.length}
            on_token = partial(note, times[arrival])
            core.add(Request(inputs, "full", options=options, on_token=on_token))
        if core.idle:
            clock.wait(coming[0].at)
        else:
            core.round()
    outcome.steps = core.calls["full"]
    for arrival, noted in times.items():
        outcome.note(arrival.at, noted)
    return outcome


# -- predicted -------------------------------------------------------------------------------------


def predicted_static(arrivals: Sequence[Arrival], slots: int, prompts: float, step: float) -> float:
    """Seconds until all are answered. prompts: of a batch of them; step: of a token of each row."""
    now = 0.0
    for begin in range(0, len(arrivals), slots):
        batch = arrivals[begin : begin + slots]
        now = max(now, batch[-1].at) + prompts + step * (max(a.length for a in batch) - 1)
    return now


def predicted_engine(arrivals: Sequence[Arrival], slots: int, costs: CallCosts) -> float:
    """The same: prompts into free slots, one by one, then a token of each row."""
    now, coming, left = 0.0, deque(arrivals), list[int]()
    while coming or left:
        while coming and len(left) < slots and coming[0].at <= now:
            left.append(coming.popleft().length - 1)
            now += costs.read
        if left:
            now += seconds(costs.full, len(left))
            left = [n - 1 for n in left if n > 1]
        elif coming:
            now = coming[0].at
    return now


# -- measured --------------------------------------------------------------------------------------


def main() -> None:
    arguments = asked(
        __doc__, dtype="bfloat16", clock=True, slots=8, requests=64, load=1.5, rounds=3,
        more=lambda parser: (
            parser.add_argument("shape", nargs="?", default="smollm2-135m"),
            parser.add_argument("--lengths", type=int, nargs=2, default=(5, 60)),
        ),
    )  # fmt: skip
    entry = measure(arguments)
    print(*(f"{name}: {value}" for name, value in entry.items()), sep="\n")
    add_to_record(arguments.shape, arguments.dtype, arguments.slots, {"arrivals": entry})


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both ways answer the arrivals of each round, which is an input of its own."""
    known, slots, lengths = shape(arguments.shape), arguments.slots, tuple(arguments.lengths)
    work, backbone = arguments.clock, known.build(getattr(torch, arguments.dtype))
    inputs = known.inputs(backbone)
    config = EngineConfig(slots=slots, limit=inputs["input_ids"].shape[1] + lengths[1] + 1)
    prove(backbone, inputs)  # else the first prompt would find the executor
    exits = ExitSet(Exits(backbone, (1,), kind="lens"))  # of which there must be some
    costs = measure_calls(backbone, exits, inputs, config, repeats=3, most=1, clock=work)
    for _ in range(2):  # the first one warms up
        prompts, step = static_batch(backbone, inputs, slots, 20, work)
    rate = (
        arguments.load * slots / (mean(lengths) * seconds(costs.full, slots) + slots * costs.read)
    )
    drawn = [poisson(rate, arguments.requests, lengths, seed) for seed in range(arguments.rounds)]

    def static(arrivals: Sequence[Arrival]) -> Outcome:
        return in_static_batches(backbone, inputs, arrivals, slots, Clock(work))

    def engine(arrivals: Sequence[Arrival]) -> Outcome:
        clock = Clock(work)
        core = EngineCore(backbone, config=config, clock=clock)
        return in_the_engine(core, inputs, arrivals, clock)

    found = Experiment({"static": static, "engine": engine}, drawn).run()
    runs = {name: outcomes for name, [outcomes] in found.items()}
    ratios = [one.seconds / other.seconds for one, other in zip(*runs.values(), strict=True)]
    predicted = [
        predicted_static(some, slots, prompts, step) / predicted_engine(some, slots, costs)
        for some in drawn
    ]
    return {
        "name": f"{backbone.name}, {slots} slots: full, answers of {lengths[0]} to {lengths[1]} "
        "tokens that come as they like",
        "shape": arguments.shape, "dtype": arguments.dtype, "slots": slots,
        "mode": "full", "exit_rate": 0.0, "lengths": lengths, "requests": arguments.requests,
        "load": arguments.load, "arrivals_per_second": rate, "rounds": arguments.rounds,
        "clock": named(work),
        "predicted": median(predicted), "measured": median(ratios), "ratios": ratios,
        **{name: _summary(outcomes) for name, outcomes in runs.items()},
        **machine(),
    }  # fmt: skip


def _summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Tokens a second, and seconds at p50 and p95 over all rounds."""
    figures: dict[str, Any] = {
        "tokens_per_second": median(o.tokens / o.seconds for o in outcomes),
        "busy": mean(o.busy for o in outcomes),
    }
    for name in ("firsts", "totals", "gaps"):
        p50, p95, _ = quantiles([x for o in outcomes for x in getattr(o, name)])
        figures[name.removesuffix("s")] = {"p50": p50, "p95": p95}
    return figures


if __name__ == "__main__":
    main()
