"""Bare twins, which decoding calls in the place of layers, exits and the LM head.

`nn.Module` looks for hooks at each call, and for parts by a detour through `__getattr__`. A decoder
layer has a dozen modules, and for one token that is a quarter of its Python. Where there are no
hooks, a twin that shares every parameter, whose call is its `forward` and whose parts are plain
attributes, computes the same, bit for bit, without.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from offramp.core.models.backbone import Backbone
from offramp.core.models.change import GLOBAL_HOOKS, HOOKS
from offramp.core.models.exits import ExitSet
from offramp.core.models.opened import HeadCode

_CALLS = (nn.Module.__call__, GradientCheckpointingLayer.__call__)

_LEAST = 2**16
"""Numbers of a weight from which on oneDNN multiplies several tokens faster."""


class SeveralTokensLinear(nn.Linear):
    """A linear layer that multiplies several tokens by oneDNN, up to twice as fast as MKL, which
    has no AVX-512 on AMD's processors. A single token is multiplied by PyTorch, bit for bit."""

    def forward(self, states: Tensor) -> Tensor:
        if states.numel() == self.in_features or torch.is_grad_enabled():
            return functional.linear(states, self.weight, self.bias)
        product = torch.ops.mkldnn._linear_pointwise
        return product(states, self.weight, self.bias, "none", [], "")  # type: ignore[no-any-return]


def _gains(module: nn.Module) -> bool:
    here = torch._C.has_mkl and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if type(module) is not nn.Linear or not here:
        return False
    weight = module.weight
    plain = type(weight) is nn.Parameter and weight.is_contiguous()
    plain = plain and weight.dtype == torch.float32 and weight.device.type == "cpu"
    return plain and weight.numel() >= _LEAST


class BareModules(dict[Any, Any]):
    """Bare twins, by the module that each replaces; a twin is made when first asked for, for one
    generation."""

    def __init__(self, caller: str) -> None:
        """caller: the Python module of the code that calls them."""
        super().__init__()
        self._caller = caller

    def __missing__(self, module: Any) -> Any:
        if not isinstance(module, nn.Module):
            return module  # a method
        made = self[module] = bare(module, self._caller)
        return made


def bare(module: nn.Module, caller: str, *, own: bool = True) -> nn.Module:
    """Return a module's bare twin; the module itself where hooks or wrappers surround `forward`.

    caller: the Python module whose code calls it. own: whether linears may multiply by
    `SeveralTokensLinear`.
    """
    if not _is_plain(module):
        return module
    kind: Any = SeveralTokensLinear if own and _gains(module) else type(module)
    made: Any = object.__new__(_straight(kind, kind.forward, kind.forward.__module__ == caller))
    made.__dict__.update(module.__dict__)
    parts = {
        name: None if part is None else bare(part, kind.forward.__module__, own=own)
        for name, part in module._modules.items()
    }
    made.__dict__["_modules"] = parts
    made.__dict__.update(parts)
    made.__dict__.update(module._parameters)
    made.__dict__.update(module._buffers)
    return made  # type: ignore[no-any-return]


def _is_plain(module: nn.Module) -> bool:
    own = module.__dict__
    return (
        type(module).__call__ in _CALLS
        and not module.training
        and "forward" not in own
        and own.get("_compiled_call_impl") is None
        and not any(own.get(table) for table in HOOKS)
        and not any(GLOBAL_HOOKS)
    )


@cache
def _straight(kind: Any, forward: Callable[..., Any], by_kin: bool) -> type[nn.Module]:
    """A class of modules as `kind`, called without what `nn.Module` does around its `forward`.

    by_kin: whether code of the same file calls them; it uses no deprecated names, so that what
    Hugging Face wraps around `forward` to translate these has nothing to do.
    """
    while by_kin and forward.__code__.co_filename.endswith("deprecation.py"):
        forward = forward.__wrapped__  # type: ignore[attr-defined]
    return type(kind.__name__, (kind,), {"__call__": forward, "__module__": kind.__module__})


def share_parts(module: nn.Module, twin: nn.Module) -> bool:
    """Return True if a module and its twin share parts, because something wraps the module."""
    own = {id(part) for part in module.modules()}
    return any(id(part) in own for part in twin.modules())


# -- what is called --------------------------------------------------------------------------------


def called_in_place(backbone: Backbone) -> BareModules:
    """Return the modules that decoding calls, by the modules of a backbone that they replace."""
    caller, instead = type(backbone.stack).forward.__module__, backbone.decoding.instead
    made: BareModules | None = None if instead is None else instead.modules(backbone, caller)
    return BareModules(caller) if made is None else made


def head_code(backbone: Backbone) -> HeadCode | None:
    """Return the code that decoding calls in the LM head's place; None: the head itself."""
    head, instead = backbone.head, backbone.decoding.instead
    twin = bare(head, type(backbone.stack).forward.__module__)
    if share_parts(head, twin):
        return None
    made = None if instead is None else instead.head(backbone)
    if made is not None:
        return made
    return twin if isinstance(twin, SeveralTokensLinear) and backbone.reader is head else None


def shortlist_head(backbone: Backbone, exits: ExitSet) -> nn.Module | None:
    """Return the head that decoding calls for the shortlist; None without a shortlist."""
    head = exits.shortlist_head(backbone)
    return None if head is None else bare(head, "")


def stack_runs(backbone: Backbone) -> None:
    """Note that the model's own stack calls its own layers, although replacements were wanted."""
    if backbone.decoding.instead is not None:
        backbone.decoding.instead.left_out(backbone, "this model or request needs its own stack")
