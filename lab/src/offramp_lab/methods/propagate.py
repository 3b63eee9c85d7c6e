"""Propagated keys and values (CALM, Schuster et al. 2022), as an engine.

What a token skips is filled before the next one is fed, by projecting its state at the exit to the
keys and values of every layer above: approximate, and nothing is computed later. One sequence a
call, through the model's own stack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import accumulate
from typing import Any, cast

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.executor import Span
from offramp.core.decoding.plan import Plan
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.engine.heads import ExitHeads
from offramp.core.errors import InputError
from offramp.core.executors.kv_cache import self_attention, store_exit_keys, store_keys
from offramp.core.executors.prefill import Prepared
from offramp.core.executors.prompt import Prompt, PromptReader
from offramp.core.executors.segments import ExitOutput, Output
from offramp.core.executors.stack import StackExecutor
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import ExitSet
from offramp.core.models.opened import LayerCall


class PropagatingReader(PromptReader):
    """Reads prompts; layers that every row's first token skips get projected keys and values."""

    def _read(self, prepared: Prepared) -> Prompt:
        if self.exits_on:
            check_projects(prepared.cache)
        # Nothing waits: the keys and values are there.
        return replace(super()._read(prepared), waits=None)

    def layer(self, call: LayerCall) -> Any:
        exited_before = self.waits is not None
        out = super().layer(call)
        if self.waits is not None:
            store_keys(self.cache, call.layer, call)
            assert self.exits is not None
            if exited_before and call.index in self.exits_on:
                store_exit_keys(self.cache, self.exits, call)
        return out


class PropagatingExecutor(StackExecutor):
    """Runs the model's own stack, and fills what a token skipped before the next one is fed."""

    _skips = False

    def _feed(self, row: Any, token: int) -> ExitOutput:
        for segment in [*row.waits]:  # one at most
            self._fill(row, segment)
        return super()._feed(row, token)

    def _fill(self, row: Any, segment: int) -> None:
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

    def run(self, segment: int, spans: Sequence[Span], asked: Sequence[int]) -> Output:
        """Run the newest column of each sequence: what the decoder has pending before it is
        filled."""
        ends = [*accumulate(span.end - span.first for span in spans)]
        newest = [Span(span.handle, span.end - 1, span.end) for span in spans]
        return super().run(segment, newest, [ends.index(place + 1) for place in asked])

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


class Propagating(Adapter):
    """An adapter whose early answers fill what tokens skip by projection."""

    @classmethod
    def of(cls, adapter: Adapter, **_: Any) -> Propagating:
        """The same exits and policy."""
        return cls(**{field.name: getattr(adapter, field.name) for field in fields(adapter)})

    def plan(self, policy: ExitPolicy | None = None) -> Plan:
        """The adapter's plan, whose skipped keys and values are projected."""
        return propagated(super().plan(policy), self.backbone, self.exits)


def propagated(plan: Plan, backbone: Backbone, exits: ExitSet | None) -> Plan:
    """The plan whose skipped keys and values are projected.

    Raises:
        InputError: a lossless plan.
    """
    if not plan.depths:
        return plan
    if plan.policy.lossless:
        raise InputError(
            "Propagated keys and values are approximate, and lossless answers need exact ones.",
            "Leave the engine 'propagate' out.",
        )

    def reader(*, prefix_cache: Any = None, **more: Any) -> PropagatingReader:
        kept = None if plan.first_may_exit else prefix_cache  # an approximate prompt is not kept
        return PropagatingReader(backbone, exits, plan.depths, prefix_cache=kept, **more)

    def executor(**_: Any) -> PropagatingExecutor:
        reads = cast(ExitHeads, plan.heads).needs_previous_state
        return PropagatingExecutor(backbone, exits, plan.depths, needs_previous_state=reads)

    return replace(plan, reader=reader, executor=executor)


def check_projects(cache: Any) -> None:
    """Raise `InputError` where layers keep states in place of keys and values.

    All of such a layer runs to make its state, so a token that skips it would save nothing.
    """
    if any(hasattr(entry, "is_conv_states_initialized") for entry in self_attention(cache).layers):
        raise InputError(
            "The engine 'propagate' stores keys of skipped layers, and layers of this model keep "
            "states instead, for which they run whole: nothing would be saved.",
            "Leave it out.",
        )
