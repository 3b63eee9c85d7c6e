"""Predicted against measured: decoding speed of exits that follow a plan, on any weights.

Every case decodes as many tokens as the full model does, through the same loop, in interleaved
rounds; figures are ratios of medians. What was predicted is the cost of the very plan that ran.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from offramp.calibration.cost_model import LENGTHS, Costs, token_seconds
from offramp.engine.decoding.scheduler import Schedule
from offramp.engine.generate import generate
from offramp.errors import InputError
from offramp.evaluation.scripted_exits import OPTIONS, Script, generate_forced
from offramp.evaluation.timing import exit_generate_fn, speedup, stock_generate_fn, time_interleaved
from offramp.models.backbone import Backbone
from offramp.models.exits import Exits, ExitSet, check_depths
from offramp.report.html import times
from offramp.report.table import Table
from offramp_lab.experiments.benchmark.cases import POLICIES, Case
from offramp_lab.experiments.benchmark.lossless_costs import best_draft, rounds_seconds
from offramp_lab.experiments.benchmark.simulator import decoding_seconds
from offramp_lab.experiments.benchmark.unit_costs import CallCosts
from offramp_lab.experiments.experiment import machine
from offramp_lab.methods.propagate import measure_store
from offramp_lab.methods.propagate import token_seconds as propagated_seconds


def bench(
    backbone: Backbone,
    inputs: Mapping[str, Any],
    cases: Sequence[Case],
    costs: Costs,
    *,
    exits: ExitSet | Exits | None = None,
    tokens: int = 40,
    rounds: int = 5,
    score: str = "max_probability",
    independent: bool = False,
    shortlist: int | None = None,
    seed: int = 0,
    progress: Any = iter,
) -> list[dict[str, Any]]:
    """Measure each case, and full depth against HF's own `generate`, after the prompt `inputs`.

    tokens: decoded by each, behind the first. independent: rows of a batch exit by plans of their
    own, drawn from `seed`; else together. shortlist: exits read so many tokens of the vocabulary,
    what the full model says among them; `costs` must be measured so too. Returns an entry for each
    case: see `entry`.

    Raises:
        InputError: depths that do not fit, lossless cases in a batch, nothing to measure.
    """
    rows = len(inputs["input_ids"])
    _check_measurable(cases, rows, tokens, rounds)
    if exits is None and cases:
        depths = check_depths(sorted({c.depth for c in cases}), backbone.depth)
        exits = Exits(backbone, depths).requires_grad_(False)
    greedy = {"max_new_tokens": 1 + tokens, **OPTIONS}
    reference = generate(backbone, inputs, **greedy).new_tokens[0]
    exits = None if exits is None else ExitSet.of(exits)
    if exits is not None:
        shortlist = shortlist or (None if exits.shortlist is None else len(exits.shortlist))
        if shortlist is not None:
            exits = replace(exits, shortlist=any_shortlist(backbone, shortlist, reference))
    runners = {repr(c): _Runner(c, backbone, exits, costs, score, rows, tokens) for c in cases}
    store = 0.0
    if exits is not None and any(case.policy == "propagate" for case in cases):
        store = measure_store(backbone, inputs, exits, costs, rounds=rounds)
    for runner in runners.values():
        runner.store = store
        runner.plan(reference, independent, seed)
    methods = {
        "generate": stock_generate_fn(backbone, **greedy),
        "full": exit_generate_fn(backbone, **greedy),
    }
    methods |= {name: runner.run for name, runner in runners.items()}
    timings = time_interleaved(methods, [inputs], rounds=rounds, progress=progress)

    full = timings["full"].decode
    against_stock = speedup(timings["generate"].decode, full)
    entries = [entry(backbone, "full", rows, None, None, 1.0, against_stock, rounds)]
    for name, runner in runners.items():
        measured, case = speedup(full, timings[name].decode), runner.case
        entries.append(
            entry(
                backbone, case.policy, rows, case.depth, case.rate, runner.predicted, measured,
                rounds, shortlist=shortlist, **runner.extra(measured),
            )
        )  # fmt: skip
    return entries


def _check_measurable(cases: Sequence[Case], rows: int, tokens: int, rounds: int) -> None:
    if tokens < 1 or rounds < 1 or (rows > 1 and any(c.policy == "lossless" for c in cases)):
        raise InputError(
            f"{tokens} tokens in {rounds} rounds of batch {rows} cannot be measured like that.",
            "Give at least one token and one round, and lossless cases a batch of 1.",
        )


def any_shortlist(backbone: Backbone, size: int, spoken: Tensor | None = None) -> Tensor:
    """A shortlist [size], ascending, with the tokens of `spoken`: for speed, any will do.

    Raises:
        InputError: a size that the vocabulary does not have, or that holds not all of `spoken`.
    """
    needed = torch.unique(spoken) if spoken is not None else torch.zeros(0, dtype=torch.long)
    if not max(2, len(needed)) <= size <= backbone.vocabulary:
        raise InputError(
            f"A shortlist of {size} out of {backbone.vocabulary} tokens cannot be.",
            f"Give a number from {max(2, len(needed))} to {backbone.vocabulary}.",
        )
    others = torch.ones(backbone.vocabulary, dtype=torch.bool)
    others[needed.cpu()] = False
    fillers = others.nonzero()[: size - len(needed), 0]
    return torch.cat([needed.cpu(), fillers]).sort().values.to(backbone.device)


def entry(
    backbone: Backbone,
    policy: str,
    batch: int,
    depth: int | None,
    rate: float | None,
    predicted: float,
    measured: float,
    repeats: int,
    **extra: Any,
) -> dict[str, Any]:
    """One line of the record. predicted, measured: speed in multiples of full depth's; for policy
    "full", of HF `generate`'s."""
    what = "full depth against HF generate" if depth is None else f"{policy}, exit at {depth}"
    return {
        "name": f"{backbone.name}: {what}" + ("" if rate is None else f", {rate:.0%}"),
        "shape": backbone.name,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "batch": batch,
        "exit_depth": depth,
        "exit_rate": rate,
        "policy": policy,
        "predicted": predicted,
        "measured": measured,
        "repeats": repeats,
        **machine(),
        **extra,
    }


class _Runner:
    """Runs one case by its plan, and knows what the plan should cost."""

    def __init__(
        self,
        case: Case,
        backbone: Backbone,
        exits: ExitSet | None,
        costs: Costs,
        score: str,
        rows: int,
        tokens: int,
    ) -> None:
        assert exits is not None
        self.case, self._backbone, self._exits, self._costs = case, backbone, exits, costs
        self._score, self._rows, self._tokens = score, rows, tokens
        self._lossless = case.policy == "lossless"
        self._options = dict(POLICIES[case.policy])
        self._ids = exits.shortlist
        if self._ids is not None:
            self._options["shortlist"] = True
        if self._lossless:
            self._options["max_draft"] = case.max_draft or best_draft(
                costs, case.depth, acceptance=case.rate
            )
        self.store = 0.0  # of one layer that a token skips, where keys and values are propagated
        self._leave: Tensor
        self._says: Tensor | None = None
        self._rounds: tuple[tuple[int, int], ...] = ()

    def plan(self, reference: Tensor, independent: bool, seed: int) -> None:
        """Decide which tokens exit; reference: what the full model says [N]."""
        draw = torch.Generator().manual_seed(seed)
        if self._lossless:
            self._leave = torch.ones(len(reference), 1, dtype=torch.bool)
            wrong = round((1.0 - self.case.rate) * self._tokens)
            at = 1 + torch.randperm(self._tokens, generator=draw)[:wrong]
            said, size = reference, self._backbone.vocabulary
            if self._ids is not None:
                said, size = torch.searchsorted(self._ids, reference), len(self._ids)
            self._says = said.clone()
            self._says[at] = (said[at] + 1) % size
            return
        if independent:
            leave = torch.rand(self._tokens, self._rows, generator=draw) < self.case.rate
        else:
            leave = spread(self._tokens, self.case.rate)[:, None].expand(-1, self._rows)
        self._leave = torch.cat([torch.zeros(1, self._rows, dtype=torch.bool), leave])

    def run(self, inputs: Mapping[str, Any], stop: StoppingCriteriaList) -> Tensor:
        """The `GenerateFn` of `time_interleaved`."""
        script = Script(self._leave, says=self._says, score=self._score)
        output = generate_forced(
            self._backbone, inputs, self._exits, script, 1 + self._tokens,
            depth=self.case.depth, criteria=list(stop), **self._options,
        )  # fmt: skip
        self._rounds = output.rounds
        return output.new_tokens.flatten()

    @property
    def predicted(self) -> float:
        """Speed in multiples of full depth's; lossless: of the rounds that ran."""
        full = self._tokens * self._costs.full
        if self._lossless:
            drafted = [made for made, _ in self._rounds]
            return full / rounds_seconds(self._costs, self.case.depth, drafted)
        propagates = self.case.policy == "propagate"
        if self._rows > 1 and not propagates:
            return full / decoding_seconds(
                batch_costs(self._costs, self.case.depth),
                lambda _, row, place: bool(self._leave[place, row]),
                [1 + self._tokens] * self._rows,
                Schedule.of(self._rows),
            )
        # Rows that are propagated run one by one: a step is as deep as its deepest.
        left = self._leave[1:].all(1).numpy()
        depths = np.where(left, self.case.depth, self._costs.layers)
        at = [self.case.depth]
        if propagates:
            return full / propagated_seconds(self._costs, self.store, depths, at)
        return full / float(token_seconds(self._costs, depths, at))

    def extra(self, measured: float) -> dict[str, Any]:
        """What else is worth knowing of a case that ran."""
        if self._lossless:
            made, accepted = (sum(counts) for counts in zip(*self._rounds, strict=True))
            return {"max_draft": self._options["max_draft"], "drafted": made, "accepted": accepted}
        if self.case.rate == 0.0:
            layer = self._costs.layer[0]
            return {"check_layers": (1.0 / measured - 1.0) * self._costs.full / layer}
        return {}


def batch_costs(costs: Costs, depth: int) -> CallCosts:
    """What the calls of a batch take that exits at `depth`, out of measured parts; fewer tokens
    than rows at once as many."""
    rows, layers = costs.batch, costs.layers - depth
    sizes = [rows * length for length in LENGTHS]
    feed = costs.token + depth * costs.layer[0] + costs.exit + costs.check
    deep = tuple((n, costs.reenter + layers * s) for n, s in zip(sizes, costs.layer, strict=True))
    head = tuple(zip(sizes, costs.head, strict=True))
    return CallCosts(
        rows, costs.context, ((rows, feed),), deep, head, ((rows, costs.full),), read=0.0
    )


def spread(tokens: int, rate: float) -> Tensor:
    """Which of `tokens` tokens exit [N]: a share `rate`, those that stay evenly between."""
    stayed = ((1.0 - rate) * torch.arange(tokens + 1) + 1e-6).floor()
    return stayed.diff() == 0


def table(costs: Costs, entries: Sequence[Mapping[str, Any]]) -> str:
    """Costs in layers and cases, as a person reads them on a terminal."""
    unit = costs.layer[0]
    parts = {
        "layer over 1, 2, 4, 8": " ".join(f"{s / unit:.2f}" for s in costs.layer),
        "LM head": f"{costs.head[0] / unit:.2f}",
        "exit's layer": f"{costs.exit / unit:.2f}",
        "rest of a check": f"{costs.check / unit:.2f} (score {costs.score / unit:.2f})",
        "keys of a shut exit": f"{costs.store / unit:.2f}",
        "token besides": f"{costs.token / unit:.2f}",
        "re-entry": f"{costs.reenter / unit:.2f}",
    }
    told: dict[str, Callable[[Any], str]] = {
        "": lambda e: str(e["name"]),
        "predicted": lambda e: times(e["predicted"]),
        "measured": lambda e: times(e["measured"]),
    }
    lines = [
        f"{costs.layers} layers, batch {costs.batch}, {costs.context} tokens in the cache: "
        f"{costs.full * 1e3:.2f} ms a token, {unit * 1e3:.3f} ms a layer; in layers:",
        *(f"  {name:26}{value}" for name, value in parts.items()),
        "",
        Table.of(entries, told).plain(),
    ]
    return "\n".join(lines)
