"""A rehearsal: the stack runs, and its layers only note what they are handed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offramp.engine.kv_cache import CACHE_NAMES
from offramp.models.backbone import Backbone
from offramp.models.discovery.twin import twin
from offramp.models.intercept import stand_ins
from offramp.models.opened import LayerCall


class CannotRehearseError(Exception):
    """Something about this model or request is not known here: its stack must run itself."""


class _Recorder:
    """A layer handler that notes the calls, and hands the states through."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.calls: list[LayerCall] = []

    def layer(self, call: LayerCall) -> Any:
        self.calls.append(call)
        return self.backbone.skipped_layer_output(call)


class _Noted(nn.Module):
    """Stands where a norm stood, and keeps what enters it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.__dict__["norm"] = norm
        self.entered: Tensor | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        self.entered = hidden
        return self.__dict__["norm"](hidden)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Run:
    """What one run of the stack came to: the calls of its layers, and the sum of embeddings and
    positions that entered its norm of embeddings, where it has one."""

    calls: list[LayerCall]
    before_norm: Tensor | None


class Stage:
    """A twin of the stack whose layers only note their calls.

    stack: one that is called in its place, with the same layers.
    """

    def __init__(self, backbone: Backbone, stack: Any = None) -> None:
        self.backbone, self._stack = backbone, backbone.stack if stack is None else stack
        self.layers = range(backbone.depth)
        self.embed: Any = backbone.stack.get_input_embeddings()
        norms = [n for n, m in backbone.stack.named_children() if "norm" in n]
        norms = [n for n in norms if backbone.stack.get_submodule(n) is not backbone.norm]
        if len(norms) > 1 or not isinstance(self.embed, nn.Embedding):
            raise CannotRehearseError("how embeddings enter the layers")
        self._norm_name = norms[0] if norms else None
        self.norm = backbone.stack.get_submodule(norms[0]) if norms else None

    def run(self, kw: Mapping[str, Any]) -> _Run:
        """Raise `CannotRehearseError` where the stack does more than call its layers and a norm, or
        does not run without them."""
        recorder = _Recorder(self.backbone)
        stack: Any = twin(self._stack)
        stack._modules[self.backbone.family.layers] = stand_ins(self.backbone, recorder)
        noted = None
        if self._norm_name is not None and self.norm is not None:
            noted = stack._modules[self._norm_name] = _Noted(self.norm)
        try:
            out = stack(**kw).last_hidden_state
        except Exception as error:  # code that looks at more of the cache than is there
            raise CannotRehearseError(f"{type(error).__name__} in the stack: {error}") from error
        calls = recorder.calls
        if [call.index for call in calls] != [*self.layers]:
            raise CannotRehearseError("which layers the stack calls")
        entered = calls[0].hidden
        if not all(c.hidden is entered or torch.equal(c.hidden, entered) for c in calls):
            raise CannotRehearseError("what the stack does between its layers")
        if not torch.equal(out, self.backbone.final_norm(entered)):
            raise CannotRehearseError("what the stack does behind its layers")
        return _Run(calls, None if noted is None else noted.entered)


def named(call: LayerCall) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Which of a call's arguments came by position, and all of them by name."""
    names = [*inspect.signature(type(call.layer).forward).parameters][2 : 2 + len(call.args)]
    return tuple(names), {**dict(zip(names, call.args, strict=True)), **call.kw}


def same(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """The name of an argument of a layer that differs between two calls; None where none does.

    A mask of zeros, which attention adds, is as good as none.
    """
    for name in {*ours, *theirs} - {*CACHE_NAMES}:
        mine, other = ours.get(name), theirs.get(name)
        if not _equal(mine, other) and not (name == "attention_mask" and _nothing(mine, other)):
            return name
    return None


def _nothing(mine: Any, mask: Any) -> bool:
    added = isinstance(mask, Tensor) and mask.dtype != torch.bool
    return mine is None and added and not bool(mask.any())


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other) and bool(one == other)
