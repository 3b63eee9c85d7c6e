"""Modules whose call is their `forward`, and whose parts are plain attributes.

`nn.Module` looks for hooks at each call, and for parts by a detour through `__getattr__`. A decoder
layer has a dozen modules, and for one token that is a quarter of its Python. Where there are no
hooks, a twin that shares every parameter computes the same, bit for bit, without.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module
from transformers.modeling_layers import GradientCheckpointingLayer

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_GLOBAL_HOOKS = [getattr(torch_module, f"_global{table}") for table in _HOOKS]
"""Tables that stay the same objects."""
_CALLS = (nn.Module.__call__, GradientCheckpointingLayer.__call__)


class BareModules(dict[Any, Any]):
    """By module, what is called in its place; made when first asked for, for one generation."""

    def __init__(self, caller: str) -> None:
        """caller: the Python module of the code that calls them."""
        super().__init__()
        self._caller = caller

    def __missing__(self, module: Any) -> Any:
        if not isinstance(module, nn.Module):
            return module  # a method
        made = self[module] = bare(module, self._caller)
        return made


def bare(module: nn.Module, caller: str) -> nn.Module:
    """The twin of a module; the module itself where something stands around its `forward`.

    caller: the Python module of the code that calls it.
    """
    if not _is_plain(module):
        return module
    kind: Any = type(module)
    made: Any = object.__new__(_straight(kind, kind.forward.__module__ == caller))
    made.__dict__.update(module.__dict__)
    parts = {
        name: None if part is None else bare(part, kind.forward.__module__)
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
        and not any(own.get(table) for table in _HOOKS)
        and not any(_GLOBAL_HOOKS)
    )


@cache
def _straight(kind: Any, by_kin: bool) -> type[nn.Module]:
    """A class of modules as `kind`, called without what `nn.Module` does around `forward`.

    by_kin: whether code of the same file calls them; it uses no deprecated names, so that what
    Hugging Face wraps around `forward` to translate these has nothing to do.
    """
    forward: Callable[..., Any] = kind.forward
    while by_kin and forward.__code__.co_filename.endswith("deprecation.py"):
        forward = forward.__wrapped__  # type: ignore[attr-defined]
    return type(kind.__name__, (kind,), {"__call__": forward, "__module__": kind.__module__})
