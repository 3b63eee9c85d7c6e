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

from offramp.engine.decoding.prompt import PromptReader
from offramp.engine.decoding.scheduler import Schedule
from offramp.engine.policy import MODES, ExitPolicy
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
from offramp_lab.experiments.benchmark.scripted_reader import Script, ScriptedReader
from offramp_lab.experiments.benchmark.simulator import (
    Prediction,
    full_depth,
    quantiles,
    replay,
)
from offramp_lab.experiments.benchmark.unit_costs import CallCosts, measure_calls
from offramp_lab.experiments.experiment import Experiment, machine

REPEATS = 2
"""Of each call, in every round, when costs are measured."""
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


@dataclass(frozen=True)
class Measured:
    """One run: decoded tokens a second, and the gaps between each row's tokens."""

    tokens_per_second: float
    gaps: tuple[float, ...]


def run_case(
    backbone: Backbone,
    exits: ExitSet,
    inputs: Inputs,
    case: EngineCase,
    config: EngineConfig,
    *,
    requests: int,
    lengths: tuple[int, int],
    shortlist: bool = False,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> Measured:
    """Answer `requests` requests; count while more wait than there are slots for."""
    policy = _policy(exits, shortlist)
    never = 2.0  # a score of a guess that is never worth it
    config = replace(
        config,
        schedule=config.schedule or Schedule.of(config.slots),
        guess_above=0.0 if case.guess else never,
    )
    core = EngineCore(
        backbone,
        exits,
        policy,
        config,
        clock=clock,
        make_reader=partial(ScriptedReader, says=script_of(case, seed).happens),
    )
    written = [0]

    def count(_: Any) -> None:
        written[0] += 1

    handles = []
    for length in lengths_of(requests, lengths, seed):
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
    return Measured(tokens / took, tuple(gap for answer in over for gap in answer.gaps))


def _policy(exits: ExitSet, shortlist: bool) -> ExitPolicy:
    """Of every run: one exit, and first tokens of the full model, as the simulator has them."""
    return ExitPolicy({exits.depths[0]: 0.5}, shortlist=shortlist, exit_in_prefill=False)


def script_of(case: EngineCase, seed: int) -> Script:
    """What the exits say in a run of a case."""
    return Script(case.exit_rate if case.mode == "early_exit" else 0.0, case.right, seed)


def lengths_of(requests: int, lengths: tuple[int, int], seed: int) -> list[int]:
    """Tokens of each answer of a run."""
    draw = random.Random(seed)
    return [draw.randint(*lengths) for _ in range(requests)]


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


def costs_of(
    backbone: Backbone,
    exits: ExitSet,
    inputs: Inputs,
    config: EngineConfig,
    *,
    answer: int = 0,
    shortlist: bool = False,
    repeats: int = REPEATS,
    most: int | None = None,
    clock: Clock = time.perf_counter,
) -> CallCosts:
    """Measured call costs of an engine of that kind; the arguments are `measure_calls`'s."""
    core = EngineCore(backbone, exits, _policy(exits, shortlist), config)
    reader = PromptReader(backbone, exits, core.depths)
    most = most or max(8, min(64, 8 * config.slots))
    return measure_calls(
        core.decoder, reader, inputs, config.slots,
        repeats=repeats, most=most, answer=answer, clock=clock,
    )  # fmt: skip


def predict_case(
    costs: CallCosts,
    case: EngineCase,
    config: EngineConfig,
    lengths: tuple[int, int],
    *,
    requests: int,
    seed: int = 0,
) -> Prediction:
    """What the simulator says of the run of a case that `run_case` measures."""
    if case.mode == "full":
        rate = full_depth(costs, config.slots)
        gap = config.slots / rate
        return Prediction(rate, (gap, gap, gap))
    return replay(
        costs,
        script_of(case, seed).happens,
        lengths_of(requests, lengths, seed),
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
    requests: int | None = None,
    lengths: tuple[int, int] = (30, 60),
    shortlist: bool = False,
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
    cases = [EngineCase("full"), *(case for case in cases if case.mode != "full")]
    requests = requests or 3 * config.slots
    batches = {"against_static": stock or backbone}
    if stock is not None:
        batches["against_static_prepacked"] = backbone
    prove(backbone, inputs)  # else the first prompt would find the executor

    def taken(_: int) -> CallCosts:
        return costs_of(
            backbone, exits, inputs, config,
            answer=sum(lengths) // 4, shortlist=shortlist, clock=clock,
        )  # fmt: skip

    def run(seed: int, case: EngineCase) -> Measured:
        return run_case(
            backbone, exits, inputs, case, config, requests=requests, lengths=lengths,
            shortlist=shortlist, seed=seed, clock=clock,
        )  # fmt: skip

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
    predict = partial(predict_case, costs, config=config, lengths=lengths, requests=requests)
    predictions = {case: [predict(case, seed=n) for n in range(rounds)] for case in cases}
    shared: dict[str, Any] = {
        "depth": exits.depths[0],
        "rounds": rounds,
        "lengths": lengths,
        "context": costs.context,
    }
    runs = {case: found[case] for case in cases}
    figures = _figures(runs, predictions, {name: median(found[name]) for name in batches})
    return costs, [_entry(backbone, case, config, **shared, **figures[case]) for case in cases]


def _figures(
    runs: Mapping[EngineCase, Sequence[Measured]],
    predictions: Mapping[EngineCase, Sequence[Prediction]],
    static: Mapping[str, float],
) -> dict[EngineCase, dict[str, Any]]:
    """Speeds and gaps of each case, the full model's first; static: tokens a second of the batches
    that Hugging Face's `generate` decodes, by what is said against them."""
    speeds, predicted = (
        {case: median(run.tokens_per_second for run in of[case]) for case in runs}
        for of in (runs, predictions)
    )
    full = next(iter(runs))
    figures = {}
    for case, speed in speeds.items():
        stock = static["against_static"]
        against, predicted_against = (
            (stock, stock) if case.mode == "full" else (speeds[full], predicted[full])
        )
        figures[case] = {
            "predicted": predicted[case] / predicted_against,
            "measured": speed / against,
            **{name: speed / of for name, of in static.items()},
            "tokens_per_second": speed,
            "gaps": quantiles([gap for run in runs[case] for gap in run.gaps]),
            "predicted_gaps": [
                median(gap) for gap in zip(*(p.gaps for p in predictions[case]), strict=True)
            ],
        }
    return figures


def _entry(
    backbone: Backbone, case: EngineCase, config: EngineConfig, *, depth: int, **figures: Any
) -> dict[str, Any]:
    p50, p95, p99 = figures.pop("gaps")
    return {
        "name": f"{backbone.name}, {config.slots} slots: {case.label}",
        "shape": backbone.name,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "slots": config.slots,
        "mode": case.mode,
        "exit_depth": None if case.mode == "full" else depth,
        "exit_rate": case.exit_rate,
        "right": case.right,
        "guess": case.guess,
        "p50": p50,
        "p95": p95,
        "p99": p99,
        **figures,
        "load": os.getloadavg()[0],
        **machine(),
    }


def table(costs: CallCosts, entries: Sequence[Mapping[str, Any]]) -> str:
    """Costs and cases, as a person reads them on a terminal."""
    parts = {name: getattr(costs, name) for name in ("feed", "deep", "head", "full")}
    told: dict[str, Callable[[Any], str]] = {
        "": lambda e: str(e["name"]),
        "predicted": lambda e: times(e["predicted"]),
        "measured": lambda e: times(e["measured"]),
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
