"""Propagated keys and values (CALM, Schuster et al. 2022), as a policy of keys and values.

What a token skips is filled at once, by projecting its state at the exit to the keys and values of
every layer above: approximate, and nothing ever waits. One sequence a call, through the model's own
stack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from transformers import StoppingCriteriaList

from offramp.calibration.cost_model import Costs
from offramp.engine.decoding.decoder import Decoder
from offramp.engine.decoding.executor import Executor
from offramp.engine.decoding.prompt import Prompt, PromptReader
from offramp.engine.decoding.rule import ExitRule
from offramp.engine.decoding.sequence import Sequence as Row
from offramp.engine.executors.stack import StackExecutor
from offramp.engine.generate import Generation
from offramp.engine.kv_cache import self_attention, store_exit_keys, store_keys
from offramp.engine.policy import first_token_may_exit
from offramp.engine.prefill import Prepared
from offramp.errors import InputError
from offramp.evaluation.scripted_exits import Script, generate_forced
from offramp.evaluation.timing import time_interleaved
from offramp.models.backbone import Backbone
from offramp.models.exits import ExitSet
from offramp.models.opened import LayerCall
from offramp.models.vision_cache import VisionCache


class PropagatingReader(PromptReader):
    """Reads prompts; layers that every row's first token skips get projected keys and values."""

    def _read(self, prepared: Prepared) -> Prompt:
        if self.exits_on:
            check_projects(prepared.cache)
        # Nothing waits: the keys and values are there.
        return replace(super()._read(prepared), waits=None)

    def layer(self, call: LayerCall) -> Any:
        exited_before = self._waits is not None
        out = super().layer(call)
        if self._waits is not None:
            store_keys(self.cache, call.layer, call)
            assert self.exits is not None
            if exited_before and call.index in self.exits_on:
                store_exit_keys(self.cache, self.exits, call)
        return out


class PropagatingExecutor(StackExecutor):
    """Runs the model's own stack, and fills what a token skips."""

    _skips = False

    def skip(self, row: Any, segment: int) -> None:
        """Fill what the newest token of a sequence skips from a segment on."""
        depth = self._segments[segment].start
        part = row.waits.pop(segment)
        kw = dict(row.last)
        self._chunk, self._skips = part.states, True
        kw.pop("input_ids", None)
        kw["inputs_embeds"] = part.states.clone()
        try:
            self._call(row, range(depth, self.backbone.depth), kw)
        finally:
            self._chunk, self._skips = None, False
        row.ran = [row.ran[0]] * len(row.ran)

    def layer(self, call: LayerCall) -> Any:
        start = self._running.start
        if not self._skips or call.index < start:
            return super().layer(call)
        if call.index == start and self._chunk is not None:
            call = replace(call, hidden=self._chunk)
        store_keys(self._seen, call.layer, call)
        if call.index in self.depths and call.index != start and self.exits is not None:
            store_exit_keys(self._seen, self.exits, call)
        return self.backbone.skipped_layer_output(call)


class PropagatingDecoder(Decoder):
    """Has what a token skips filled as soon as it exits."""

    executor: PropagatingExecutor

    def _settle(self, row: Row) -> None:
        waits = [k for k in range(1, len(row.ran)) if row.pending(k) and not row.asked]
        if waits and row.error is None:
            self.executor.skip(row.handle, waits[0])
            row.ran = [row.ran[0]] * len(row.ran)
        super()._settle(row)


class Propagated(Generation):
    """A call of `generate` whose skipped keys and values are projected."""

    reads, decodes = PropagatingReader, PropagatingDecoder

    def prompt_reader(self, vision_cache: VisionCache | None, prefix_cache: Any) -> PromptReader:
        approximate = self.depths and first_token_may_exit(self.backbone, self.policy)
        return super().prompt_reader(vision_cache, None if approximate else prefix_cache)

    def executor(self, rows: int, longest: int) -> Executor:
        if not self.depths:
            return super().executor(rows, longest)
        return PropagatingExecutor(
            self.backbone, self.exits, self.depths, watches=self.asker.watches
        )

    def exit_rule(self) -> ExitRule:
        return replace(super().exit_rule(), guesses=None)  # guesses are taken back


def check_projects(cache: Any) -> None:
    """Raise `InputError` where layers keep states in place of keys and values.

    All of such a layer runs to make its state, so a token that skips it would save nothing.
    """
    if any(hasattr(entry, "is_conv_states_initialized") for entry in self_attention(cache).layers):
        raise InputError(
            "Policy kv='propagate' stores keys of skipped layers, and layers of this model keep "
            "states instead, for which they run whole: nothing would be saved.",
            "Use kv='recompute'.",
        )


def token_seconds(costs: Costs, store: float, depths: ArrayLike, exits: Sequence[int]) -> float:
    """Seconds of decoding one sequence whose depths [N] are known; no token waits for another.

    store: seconds of filling one skipped layer. exits: depths of those that are on.
    """
    ran = np.asarray(depths)
    looks = sum((ran >= depth).sum() for depth in exits)
    passed = sum((ran > depth).sum() for depth in exits)
    return float(
        len(ran) * costs.token
        + ran.sum() * costs.layer[0]
        + looks * (costs.exit + costs.check)
        + passed * costs.reenter
        + (costs.layers - ran).sum() * store
        + (ran == costs.layers).sum() * costs.head[0]
    )


def measure_store(
    backbone: Backbone,
    inputs: Mapping[str, Any],
    exits: ExitSet,
    costs: Costs,
    *,
    rounds: int = 5,
    tokens: int = 6,
) -> float:
    """Seconds of filling one skipped layer: all that a token takes longer which exits at the first
    exit, by the layers above it. Rows run one by one, and are counted together."""
    rows, depth = len(inputs["input_ids"]), exits.depths[0]
    leave = torch.tensor([False, *[True] * tokens])[:, None].expand(-1, rows)

    def run(prompt: Mapping[str, Any], stop: StoppingCriteriaList) -> Tensor:
        made = generate_forced(
            backbone, prompt, exits, Script(leave), 1 + tokens, criteria=list(stop),
            kv="propagate", shortlist=exits.shortlist is not None,
        )  # fmt: skip
        return made.new_tokens.flatten()

    timing = time_interleaved({"propagate": run}, [inputs], rounds=rounds)["propagate"]
    known = costs.token + depth * costs.layer[0] + costs.exit + costs.check
    return max(0.0, (median(timing.decode) / tokens - known) / (costs.layers - depth))
