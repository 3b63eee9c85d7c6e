"""A range of layers and the exit after them: what every executor in PyTorch does in one call.

It is the layer handler of its twin of the stack, whose layers ask it what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from offramp.core.executors.drafter import DraftingExit
from offramp.core.executors.kv_cache import store_exit_keys
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import ExitSet
from offramp.core.models.intercept import InterceptedModel
from offramp.core.models.opened import LayerCall


@dataclass(frozen=True, eq=False, slots=True)
class ExitOutput:
    """An exit's output for n tokens, on the device of the LM head.

    entry: the states that entered the exit [n, D]. state: the exit's states [n, D], before the
    final norm; None: not wanted. previous: the states one decoder layer before `entry` [n, D], if
    known. logits: of the tokens that the exit can say [n, S], if it computed them itself; `state`
    may then be missing.
    """

    entry: Tensor
    state: Tensor | None
    previous: Tensor | None = None
    logits: Tensor | None = None

    def picked(self, index: Tensor | slice) -> ExitOutput:
        """Return the output for the tokens `index` alone."""
        entry, state, previous, logits = (
            None if part is None else _picked(part, index)
            for part in (self.entry, self.state, self.previous, self.logits)
        )
        assert entry is not None
        return ExitOutput(entry, state, previous, logits)

    @staticmethod
    def joined(parts: Sequence[ExitOutput]) -> ExitOutput:
        """Return the outputs of several calls as one, in order. A state that only some calls have
        is 0 for the others; `previous` is known only where every call knew it."""
        if len(parts) == 1:
            return parts[0]
        state = previous = None
        if any(part.state is not None for part in parts):
            state = torch.cat(
                [torch.zeros_like(p.entry) if p.state is None else p.state for p in parts]
            )
        known = [part.previous for part in parts if part.previous is not None]
        if len(known) == len(parts):
            previous = torch.cat(known)
        return ExitOutput(torch.cat([part.entry for part in parts]), state, previous)


Output = ExitOutput | Tensor
"""Of an exit; or of the full model, final-normed states [n, D]."""


def picked(output: Output, index: Tensor | slice) -> Output:
    """Return the output for the tokens `index` alone."""
    return output.picked(index) if isinstance(output, ExitOutput) else _picked(output, index)


def _picked(part: Tensor, index: Tensor | slice) -> Tensor:
    return part[index] if isinstance(index, slice) else part.index_select(0, index.to(part.device))


def joined(parts: Sequence[Output]) -> Output:
    """Return the outputs of several calls as one, in order; see `ExitOutput.joined`."""
    outputs = [part for part in parts if isinstance(part, ExitOutput)]
    if outputs:
        return ExitOutput.joined(outputs)
    return torch.cat([part for part in parts if isinstance(part, Tensor)])


def in_one_copy(*numbers: Tensor) -> list[list[float]]:
    """Return tensors [n] as lists. The host waits for another device once, not for each tensor:
    they come in float32, which holds every token id."""
    if numbers[0].device.type == "cpu":
        return [each.tolist() for each in numbers]
    return [*torch.stack([each.float() for each in numbers]).tolist()]


class SegmentRunner:
    """Runs segments of a backbone, each a range of layers between two exits.

    depths: of the exits in use. needs_previous_state: whether scores read the state before an
    exit's entry. drafter: the exit that drafts on, at one of `depths`.
    """

    feed_on = None
    free_rows: int | None = None

    def __init__(
        self,
        backbone: Backbone,
        exits: ExitSet | None,
        depths: Sequence[int],
        *,
        needs_previous_state: bool = False,
        drafter: DraftingExit | None = None,
    ) -> None:
        self.backbone: Backbone = backbone
        self.exits: ExitSet | None = exits
        self._exits = {} if exits is None else exits.by_depth()
        self.depths: tuple[int, ...] = tuple(sorted(depths))
        bounds = (0, *self.depths, backbone.depth)
        self._segments = [range(start, end) for start, end in pairwise(bounds)]
        self._needs_previous, self._drafter = needs_previous_state, drafter
        self.intercepted: InterceptedModel = InterceptedModel(backbone, self)
        # of the current call
        self._seen: Any = None  # the cache as its layers see it
        self._running = range(0)
        self._needs_exit = True  # whether somebody asks the exit at the end
        self._chunk: Tensor | None = None  # states [B, T, D] that enter in the stack's place
        self._entry: Tensor | None = None  # what entered the exit [B, T, D], where it lies
        self._output: ExitOutput | None = None
        self._previous: Tensor | None = None

    def _taken(self) -> ExitOutput:
        """What the exit of the last call made of it, which is then forgotten."""
        output, self._output = self._output, None
        assert output is not None
        return output

    def _entries(self, running: range) -> list[int]:
        """Entries of the cache that layers and the exit after them write."""
        exits = () if self.exits is None else self.exits.entries
        after = [self.backbone.depth + i for i, d in enumerate(exits) if d == running.stop]
        return [*running, *after]

    def layer(self, call: LayerCall) -> Any:
        """Return a layer's output to the stack, or the state unchanged where it does not run."""
        index, running = call.index, self._running
        if index < running.start or index > running.stop:
            return self.backbone.skipped_layer_output(call)
        if index == running.start and self._chunk is not None:
            call = replace(call, hidden=self._chunk)
        if index == running.stop:
            self._at_exit(call)
            return self.backbone.skipped_layer_output(call)
        if self._needs_previous and index + 1 == running.stop:
            self._previous = self.backbone.here(call.hidden.flatten(0, -2))
        return call.run(call.layer)

    def _at_exit(self, call: LayerCall) -> None:
        """Run the exit before this layer, or only store its keys where nobody asks it."""
        here, self._entry = self.backbone.here, call.hidden
        entry = here(call.hidden.flatten(0, -2))
        if not self._needs_exit and not self._runs_anyway:
            self._store_keys(call)
            self._output = ExitOutput(entry, None, self._previous)
            return
        state = here(call.state(self._exits[call.index]).flatten(0, -2))
        self._output = ExitOutput(entry, state, self._previous)

    @property
    def _runs_anyway(self) -> bool:
        """Whether an exit's keys cannot be had without the rest of it."""
        return False

    def _store_keys(self, call: LayerCall) -> None:
        assert self.exits is not None
        store_exit_keys(self._seen, self.exits, call)
