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
from numpy.typing import ArrayLike
from torch import Tensor
from transformers import StoppingCriteriaList

from offramp.calibration.cost_model import LENGTHS, Costs, head_seconds, layer_seconds
from offramp.engine.decoding.scheduler import Schedule
from offramp.engine.generate import generate
from offramp.errors import InputError
from offramp.evaluation.scripted_exits import OPTIONS, Script, generate_forced
from offramp.evaluation.timing import exit_generate_fn, speedup, stock_generate_fn, time_interleaved
from offramp.models.backbone import Backbone
from offramp.models.exits import Exits, ExitSet
from offramp.report.html import times
from offramp.report.table import Table
from offramp_lab.experiments.benchmark.cases import POLICIES, Case
from offramp_lab.experiments.benchmark.simulator import decoding_seconds
from offramp_lab.experiments.benchmark.unit_costs import CallCosts
from offramp_lab.experiments.experiment import machine
from offramp_lab.methods.propagate import measure_store, token_seconds

LONGEST = 16
"""Tokens of the longest draft that is considered."""


def untrained(backbone: Backbone, depths: Sequence[int]) -> ExitSet:
    """Exits for speed alone."""
    return ExitSet(Exits(backbone, depths).requires_grad_(False))


def bench(
    backbone: Backbone,
    inputs: Mapping[str, Any],
    cases: Sequence[Case],
    costs: Costs,
    exits: ExitSet,
    *,
    tokens: int = 40,
    rounds: int = 5,
    independent: bool = False,
    progress: Any = iter,
) -> list[dict[str, Any]]:
    """Measure each case, and full depth against HF's own `generate`, after the prompt `inputs`.

    exits: at the depths of the cases, or more. With a shortlist they read as many tokens of the
    vocabulary, what the full model says among them; `costs` must be measured so too. tokens:
    decoded by each, behind the first. independent: rows of a batch exit by plans of their own; else
    together. Returns an entry for each case, full depth's first; `predicted` and `measured` are
    speeds in multiples of full depth's, and of full depth in multiples of HF `generate`'s.

    Raises:
        InputError: a shortlist that does not hold what the full model says.
    """
    rows = len(inputs["input_ids"])
    greedy = {"max_new_tokens": 1 + tokens, **OPTIONS}
    said = generate(backbone, inputs, **greedy).new_tokens[0]
    shortlist = None if exits.shortlist is None else len(exits.shortlist)
    exits = shortlisted(backbone, exits, shortlist, said)
    store = 0.0
    if any(case.policy == "propagate" for case in cases):
        store = measure_store(backbone, inputs, exits, costs, rounds=rounds)
    runners = {
        case: _Runner(case, backbone, exits, costs, store, said, rows, independent)
        for case in cases
    }
    methods: dict[Any, Any] = {
        "generate": stock_generate_fn(backbone, **greedy),
        "full": exit_generate_fn(backbone, **greedy),
    }
    methods |= {case: runner.run for case, runner in runners.items()}
    timings = time_interleaved(methods, [inputs], rounds=rounds, progress=progress)

    def entry(
        policy: str, depth: int | None, rate: float | None, predicted: float, measured: float
    ) -> dict[str, Any]:
        what = "full depth against HF generate" if depth is None else f"{policy}, exit at {depth}"
        return {
            "name": f"{backbone.name}: {what}" + ("" if rate is None else f", {rate:.0%}"),
            "shape": backbone.name,
            "dtype": str(backbone.dtype).removeprefix("torch."),
            "batch": rows,
            "exit_depth": depth,
            "exit_rate": rate,
            "policy": policy,
            "predicted": predicted,
            "measured": measured,
            "repeats": rounds,
            **machine(),
        }

    full = timings["full"].decode
    entries = [entry("full", None, None, 1.0, speedup(timings["generate"].decode, full))]
    for case, runner in runners.items():
        measured = speedup(full, timings[case].decode)
        told = entry(case.policy, case.depth, case.rate, runner.predicted, measured)
        entries.append({**told, "shortlist": shortlist, **runner.extra(measured)})
    return entries


def shortlisted(
    backbone: Backbone, exits: ExitSet, size: int | None, spoken: Tensor | None = None
) -> ExitSet:
    """The exits, reading so many tokens, those of `spoken` among them: for speed, any will do.

    size: None: they stay as they are.

    Raises:
        InputError: a size that the vocabulary does not have, or that holds not all of `spoken`.
    """
    if size is None:
        return exits
    needed = torch.unique(spoken) if spoken is not None else torch.zeros(0, dtype=torch.long)
    if not max(2, len(needed)) <= size <= backbone.vocabulary:
        raise InputError(
            f"A shortlist of {size} out of {backbone.vocabulary} tokens cannot be.",
            f"Give a number from {max(2, len(needed))} to {backbone.vocabulary}.",
        )
    others = torch.ones(backbone.vocabulary, dtype=torch.bool)
    others[needed.cpu()] = False
    fillers = others.nonzero()[: size - len(needed), 0]
    ids = torch.cat([needed.cpu(), fillers]).sort().values.to(backbone.device)
    return replace(exits, shortlist=ids)


class _Runner:
    """Runs one case by a plan of which tokens exit, and knows what the plan should cost.

    store: seconds of one layer that a token skips, where keys and values are propagated. said: what
    the full model says [1 + N], the first token too.
    """

    def __init__(
        self,
        case: Case,
        backbone: Backbone,
        exits: ExitSet,
        costs: Costs,
        store: float,
        said: Tensor,
        rows: int,
        independent: bool,
    ) -> None:
        self._case, self._backbone, self._exits, self._costs = case, backbone, exits, costs
        self._store, self._rows, self._tokens = store, rows, len(said) - 1
        self._lossless = case.policy == "lossless"
        self._options = dict(POLICIES[case.policy])
        self._says: Tensor | None = None
        self._rounds: tuple[tuple[int, int], ...] = ()
        if exits.shortlist is not None:
            self._options["shortlist"] = True
        draw = torch.Generator().manual_seed(0)
        if self._lossless:
            self._options["max_draft"] = best_draft(costs, case.depth, case.rate)
            self._leave = torch.ones(len(said), 1, dtype=torch.bool)
            wrong = round((1.0 - case.rate) * self._tokens)
            at = 1 + torch.randperm(self._tokens, generator=draw)[:wrong]
            size = backbone.vocabulary
            if exits.shortlist is not None:
                said, size = torch.searchsorted(exits.shortlist, said), len(exits.shortlist)
            self._says = said.clone()
            self._says[at] = (said[at] + 1) % size
            return
        if independent:
            leave = torch.rand(self._tokens, rows, generator=draw) < case.rate
        else:
            leave = spread(self._tokens, case.rate)[:, None].expand(-1, rows)
        self._leave = torch.cat([torch.zeros(1, rows, dtype=torch.bool), leave])

    def run(self, inputs: Mapping[str, Any], stop: StoppingCriteriaList) -> Tensor:
        """The `GenerateFn` of `time_interleaved`."""
        script = Script(self._leave, says=self._says)
        output = generate_forced(
            self._backbone, inputs, self._exits, script, 1 + self._tokens,
            depth=self._case.depth, criteria=list(stop), **self._options,
        )  # fmt: skip
        self._rounds = output.rounds
        return output.new_tokens.flatten()

    @property
    def predicted(self) -> float:
        """Speed in multiples of full depth's; lossless: of the rounds that ran."""
        costs, depth = self._costs, self._case.depth
        if self._lossless:
            seconds = rounds_seconds(costs, depth, [made for made, _ in self._rounds])
        elif self._case.policy == "propagate":
            # Rows run one by one: a step is as deep as its deepest.
            left = self._leave[1:].all(1).numpy()
            depths = np.where(left, depth, costs.layers)
            seconds = token_seconds(costs, self._store, depths, [depth])
        else:
            seconds = decoding_seconds(
                batch_costs(costs, depth),
                lambda _, row, place: bool(self._leave[place, row]),
                [1 + self._tokens] * self._rows,
                Schedule.of(self._rows),
            )
        return self._tokens * costs.full / seconds

    def extra(self, measured: float) -> dict[str, Any]:
        """What else is worth knowing of a case that ran."""
        if self._lossless:
            made, accepted = (sum(counts) for counts in zip(*self._rounds, strict=True))
            return {"max_draft": self._options["max_draft"], "drafted": made, "accepted": accepted}
        if self._case.rate == 0.0:
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


# -- lossless decoding by one exit, by the cost model ----------------------------------------------


def rounds_seconds(costs: Costs, depth: int, drafted: ArrayLike) -> float:
    """Seconds of lossless rounds with so many drafts each, written by one exit at `depth`.

    A round runs its drafts and one token more up to the exit, which looks at each, and all of them
    deeper at once.
    """
    drafts = np.asarray(drafted, dtype=float)
    positions = drafts + 1
    shallow = costs.token + depth * costs.layer[0] + costs.exit + costs.check
    deep = (costs.layers - depth) * layer_seconds(costs, positions) + head_seconds(costs, positions)
    return float((positions * shallow + costs.reenter + deep).sum())


def lossless_seconds(costs: Costs, depth: int, acceptance: float, drafts: int) -> float:
    """Seconds per token where every round has so many drafts.

    acceptance: share of them on which the full model agrees. A round of g writes
    (1 - a^(g+1)) / (1 - a) tokens on average (Leviathan et al. 2023).
    """
    written = (acceptance ** np.arange(drafts + 1)).sum()
    return rounds_seconds(costs, depth, drafts) / float(written)


def best_draft(costs: Costs, depth: int, acceptance: float) -> int:
    """How many drafts, from 1 to `LONGEST`, `lossless_seconds` finds fastest."""
    return min(range(1, LONGEST + 1), key=lambda n: lossless_seconds(costs, depth, acceptance, n))


# -- the table -------------------------------------------------------------------------------------


TOLD: dict[str, Callable[[Any], str]] = {
    "": lambda e: str(e["name"]),
    "predicted": lambda e: times(e["predicted"]),
    "measured": lambda e: times(e["measured"]),
}
"""Columns of a table of entries."""


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
    lines = [
        f"{costs.layers} layers, batch {costs.batch}, {costs.context} tokens in the cache: "
        f"{costs.full * 1e3:.2f} ms a token, {unit * 1e3:.3f} ms a layer; in layers:",
        *(f"  {name:26}{value}" for name, value in parts.items()),
        "",
        Table.of(entries, TOLD).plain(),
    ]
    return "\n".join(lines)
