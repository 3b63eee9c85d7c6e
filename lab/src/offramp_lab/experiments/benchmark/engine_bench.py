"""The batch engine predicted against measured: long loops, full slots, scripted exits.

More requests than slots, of staggered lengths, so that rows join and leave all the time and what is
pending has to be flushed. Counted are tokens and seconds of decoding calls while the queue is not
empty. Beside it, in the same interleaved rounds, Hugging Face's own static batch at full depth.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from transformers import StoppingCriteriaList

from offramp.engine.decoding.scheduler import Schedule
from offramp.engine.policy import MODES
from offramp.engine.self_check import prove
from offramp.errors import InputError, check_known
from offramp.evaluation.scripted_exits import OPTIONS
from offramp.evaluation.timing import FirstToken
from offramp.models.backbone import Backbone
from offramp.models.exits import ExitSet
from offramp.report.html import times
from offramp.report.table import Table
from offramp.serving.core import EngineCore
from offramp.serving.engine_config import EngineConfig
from offramp.serving.request import Request
from offramp_lab.experiments.benchmark.bench import TOLD
from offramp_lab.experiments.benchmark.scripted_reader import ScriptedReader, drawn
from offramp_lab.experiments.benchmark.simulator import (
    Run,
    full_depth,
    quantiles,
    replay,
)
from offramp_lab.experiments.benchmark.unit_costs import CallCosts, engine_policy, measure_calls
from offramp_lab.experiments.experiment import Experiment, machine

Inputs = Mapping[str, Any]
Clock = Callable[[], float]


@dataclass(frozen=True)
class EngineCase:
    """exit_rate: share of tokens that exit, in early exit mode. right: share of the guesses, of all
    tokens in lossless mode, that the full model confirms. guess: else unconfident rows park."""

    mode: str
    exit_rate: float = 0.0
    right: float = 0.0
    guess: bool = True

    def __post_init__(self) -> None:
        check_known("Mode", [self.mode], MODES)
        if not (0.0 <= self.exit_rate <= 1.0 and 0.0 <= self.right <= 1.0):
            raise InputError(f"{self} cannot be.", "Give shares from 0 to 1.")

    @property
    def label(self) -> str:
        """For a table."""
        if self.mode == "full":
            return "full"
        if self.mode == "lossless":
            return f"lossless, {self.right:.0%} accepted"
        what = f"guess, {self.right:.0%} right" if self.guess else "park"
        return f"{self.exit_rate:.0%} exit, {what}"


def run_case(
    backbone: Backbone,
    exits: ExitSet,
    inputs: Inputs,
    case: EngineCase,
    config: EngineConfig,
    lengths: tuple[int, int],
    *,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> Run:
    """Answer the requests of a run; count while more wait than there are slots for."""
    never = 2.0  # a score of a guess that is never worth it
    core = EngineCore(
        backbone,
        exits,
        engine_policy(exits),
        replace(config, guess_above=0.0 if case.guess else never),
        clock=clock,
        make_reader=partial(ScriptedReader, says=drawn(case.exit_rate, case.right, seed)),
    )
    written = [0]

    def count(_: Any) -> None:
        written[0] += 1

    handles = []
    for length in lengths_of(config.slots, lengths, seed):
        options = {**OPTIONS, "max_new_tokens": length}
        handles.append(core.add(Request(inputs, case.mode, on_token=count, options=options)))
    while core.running < config.slots:
        core.round()
    begun, joined, spent = written[0], core.calls["read"], _decoding(core)
    while core.waiting:
        core.round()
    firsts = core.calls["read"] - joined
    tokens, took = written[0] - begun - firsts, _decoding(core) - spent
    core.cancel_all()
    core.run()
    over = [h.result() for h in handles if not h.cancelled()]
    return Run(tokens / took, [gap for answer in over for gap in answer.gaps])


def lengths_of(slots: int, lengths: tuple[int, int], seed: int) -> list[int]:
    """Tokens of each answer of a run: three times as many as there are slots."""
    draw = random.Random(seed)
    return [draw.randint(*lengths) for _ in range(3 * slots)]


def _decoding(core: EngineCore) -> float:
    return sum(took for kind, took in core.seconds.items() if kind != "read")


def static_batch(
    backbone: Backbone, inputs: Inputs, slots: int, tokens: int, clock: Clock = time.perf_counter
) -> tuple[float, float]:
    """Seconds of Hugging Face's `generate` on `slots` equal prompts: of these, and of a token of
    each."""
    rows = {name: torch.cat([value] * slots) for name, value in inputs.items()}
    begin, watch = clock(), FirstToken(clock)
    options = {**OPTIONS, "max_new_tokens": tokens}
    backbone.model.generate(**rows, stopping_criteria=StoppingCriteriaList([watch]), **options)
    assert watch.seconds is not None
    return watch.seconds - begin, (clock() - watch.seconds) / (tokens - 1)


def predict_case(
    costs: CallCosts,
    case: EngineCase,
    config: EngineConfig,
    lengths: tuple[int, int],
    *,
    seed: int = 0,
) -> Run:
    """What the simulator says of the run of a case that `run_case` measures."""
    if case.mode == "full":
        rate = full_depth(costs, config.slots)
        return Run(rate, [config.slots / rate])
    return replay(
        costs,
        drawn(case.exit_rate, case.right, seed),
        lengths_of(config.slots, lengths, seed),
        config.schedule or Schedule.of(config.slots),
        guess=case.guess,
        slots=config.slots,
        longest=config.longest,
    )


def bench_engine(
    backbone: Backbone,
    exits: ExitSet,
    inputs: Inputs,
    cases: Sequence[EngineCase],
    config: EngineConfig,
    *,
    rounds: int = 3,
    lengths: tuple[int, int] = (30, 60),
    stock: Backbone | None = None,
    clock: Clock = time.perf_counter,
    title: str = "",
) -> tuple[CallCosts, list[dict[str, Any]]]:
    """Costs, and an entry for each case and the full model.

    predicted, measured: speed in multiples of the full model's in the same engine; of the full
    model, of the static batch's. against_static: of every case. stock: whose static batch it is,
    where the backbone's own weights are laid out anew (`offramp.models.quantized.prepacked`); then
    against_static_prepacked is of a static batch with the backbone's. clock: returns seconds; on a
    shared machine, `time.thread_time` with one thread. title: of a progress bar.
    """
    full = EngineCase("full")
    cases = [full, *(case for case in cases if case.mode != "full")]
    config = replace(config, schedule=config.schedule or Schedule.of(config.slots))
    batches = {"against_static": stock or backbone}
    if stock is not None:
        batches["against_static_prepacked"] = backbone
    prove(backbone, inputs)  # else the first prompt would find the executor

    def taken(_: int) -> CallCosts:
        answer = sum(lengths) // 4
        return measure_calls(backbone, exits, inputs, config, answer=answer, clock=clock)

    def run(seed: int, case: EngineCase) -> Run:
        return run_case(backbone, exits, inputs, case, config, lengths, seed=seed, clock=clock)

    def batch(_: int, model: Backbone) -> float:
        return config.slots / static_batch(model, inputs, config.slots, lengths[1], clock)[1]

    methods: dict[Any, Callable[[int], Any]] = {
        name: partial(batch, model=model) for name, model in batches.items()
    }
    methods["costs"] = taken  # in every round, as the machine's speed changes
    methods |= {case: partial(run, case=case) for case in cases}
    # An input is a round: each draws anew which tokens exit.
    found = {n: of for n, [of] in Experiment(methods, range(rounds), title=title).run().items()}
    costs = CallCosts.median(found["costs"])
    static = {name: median(found[name]) for name in batches}
    predictions = {
        case: [predict_case(costs, case, config, lengths, seed=n) for n in range(rounds)]
        for case in cases
    }

    def entry(case: EngineCase) -> dict[str, Any]:
        speed, predicted = _speed(found[case]), _speed(predictions[case])
        against = predicted_against = static["against_static"]
        if case != full:
            against, predicted_against = _speed(found[full]), _speed(predictions[full])
        p50, p95, p99 = quantiles([gap for run in found[case] for gap in run.gaps])
        by_run = (quantiles(run.gaps) for run in predictions[case])
        return {
            "name": f"{backbone.name}, {config.slots} slots: {case.label}",
            "shape": backbone.name,
            "dtype": str(backbone.dtype).removeprefix("torch."),
            "slots": config.slots,
            "mode": case.mode,
            "exit_depth": None if case == full else exits.depths[0],
            "exit_rate": case.exit_rate,
            "right": case.right,
            "guess": case.guess,
            "p50": p50,
            "p95": p95,
            "p99": p99,
            "rounds": rounds,
            "lengths": lengths,
            "context": costs.context,
            "predicted": predicted / predicted_against,
            "measured": speed / against,
            **{name: speed / of for name, of in static.items()},
            "tokens_per_second": speed,
            "predicted_gaps": [median(gap) for gap in zip(*by_run, strict=True)],
            "load": os.getloadavg()[0],
            **machine(),
        }

    return costs, [entry(case) for case in cases]


def _speed(runs: Sequence[Run]) -> float:
    return median(run.tokens_per_second for run in runs)


def table(costs: CallCosts, entries: Sequence[Mapping[str, Any]]) -> str:
    """Costs and cases, as a person reads them on a terminal."""
    parts = {name: getattr(costs, name) for name in ("feed", "deep", "head", "full")}
    told: dict[str, Callable[[Any], str]] = {
        **TOLD,
        "static": lambda e: times(e["against_static"]),
        "p50 ms": lambda e: f"{1e3 * e['p50']:.1f}",
        "p95 ms": lambda e: f"{1e3 * e['p95']:.1f}",
        "p99 ms": lambda e: f"{1e3 * e['p99']:.1f}",
    }
    spent = ", ".join(
        f"{name} {' '.join(f'{n}: {1e3 * s:.1f}' for n, s in part)}" for name, part in parts.items()
    )
    return (
        f"{costs.slots} slots, {costs.context} tokens of context; milliseconds by tokens: {spent}; "
        f"a prompt {1e3 * costs.read:.1f}\n\n{Table.of(entries, told).plain()}"
    )
