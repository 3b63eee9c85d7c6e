"""A range of layers and the exit behind them: what every executor in PyTorch does in one call.

It is the layer handler of its twin of the stack, whose layers ask it what to do. Of a call through
all layers the exits on the way get their keys, or the one that drafts on runs as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

from torch import Tensor, nn

from offramp.engine.decoding.reader import Looks, anyone, no_one
from offramp.engine.drafter import Drafter
from offramp.engine.exit_check import ExitOutput
from offramp.engine.kv_cache import store_exit_keys
from offramp.models.backbone import Backbone
from offramp.models.exits import ExitSet
from offramp.models.intercept import InterceptedModel
from offramp.models.opened import LayerCall

Passing = Literal["keys", "drafts", ""]
"""What becomes of exits that a call goes past: they get their keys, and what enters the one that
drafts on is kept; that one runs as well; nothing."""


class SegmentRunner:
    """Runs segments of a backbone: layers up to an exit, or from there on.

    depths: of the exits in use. watches: whether scores read the state before an exit's entry.
    drafter: of the exit that drafts on, one of `depths`.
    """

    def __init__(
        self,
        backbone: Backbone,
        exits: ExitSet | None,
        depths: Sequence[int],
        *,
        watches: bool = False,
        drafter: Drafter | None = None,
    ) -> None:
        self.backbone, self.exits, self.depths = backbone, exits, tuple(sorted(depths))
        bounds = (0, *self.depths, backbone.depth)
        self._segments = [range(start, end) for start, end in pairwise(bounds)]
        self._watches, self._drafter = watches, drafter
        self.intercepted = InterceptedModel(backbone, self)
        # of the current call
        self._seen: Any = None  # the cache as its layers see it
        self._running = range(0)
        self._passing: Passing = ""
        self._looks: Looks = anyone
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
        """Entries of the cache that layers and the exit behind them write."""
        exits = () if self.exits is None else self.exits.entries
        behind = [self.backbone.depth + i for i, d in enumerate(exits) if d == running.stop]
        return [*running, *behind]

    def layer(self, call: LayerCall) -> Any:
        """What the stack gets for a layer: its output, or the state handed through."""
        index, running = call.index, self._running
        if index < running.start or index > running.stop:
            return self.backbone.skipped_layer_output(call)
        if index == running.start and self._chunk is not None:
            call = replace(call, hidden=self._chunk)
        if index == running.stop:
            self._at_exit(call)
            return self.backbone.skipped_layer_output(call)
        if self._passing and index in self.depths:
            self._pass_exit(call)
        if self._watches and index + 1 == running.stop:
            self._previous = self.backbone.here(call.hidden.flatten(0, -2))
        return call.run(self._called(call.layer))

    def _called(self, module: nn.Module) -> nn.Module:
        """What runs in a layer's place."""
        return module

    def _at_exit(self, call: LayerCall) -> None:
        """Run the exit before this layer, or only store its keys where nobody looks."""
        here, self._entry = self.backbone.here, call.hidden
        entry = here(call.hidden.flatten(0, -2))
        if not self._runs_anyway and not self._looks(call.index, entry):
            self._store_keys(call)
            self._output = ExitOutput(entry, None, self._previous)
            return
        state = here(self._run_exit(call).flatten(0, -2))
        self._output = ExitOutput(entry, state, self._previous)

    def _pass_exit(self, call: LayerCall) -> None:
        if self._drafter is not None and call.index == self._drafter.depth:
            self._looks = anyone if self._passing == "drafts" else no_one
            self._at_exit(call)
        elif self._runs_anyway:
            self._run_exit(call)
        else:
            self._store_keys(call)

    @property
    def _runs_anyway(self) -> bool:
        """Whether an exit's keys cannot be had without the rest of it."""
        return False

    def _run_exit(self, call: LayerCall) -> Tensor:
        """The states [B, T, D] that the exit before a layer makes."""
        assert self.exits is not None
        return self.exits.run(call.index, call)

    def _store_keys(self, call: LayerCall) -> None:
        assert self.exits is not None
        store_exit_keys(self._seen, self.exits, call)
