"""Shallow copies of modules that share every parameter with the original, to hang others into."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from offramp.core.models.sharding import hook_twin

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def twin(module: nn.Module) -> nn.Module:
    """Return a shallow copy of a module: the same parameters, buffers and children in tables of its
    own, so that other modules can be put in."""
    made: Any = object.__new__(type(module))  # copy.copy refuses parametrised modules
    made.__dict__ = dict(module.__dict__)
    made._modules = dict(module._modules)
    for table in _HOOKS:  # a hook on the twin must not show on the original
        made.__dict__[table] = copy.copy(module.__dict__[table])
    hook_twin(made)
    return made  # type: ignore[no-any-return]


def graft(root: nn.Module, path: str, leaf: nn.Module) -> None:
    """Put `leaf` at `path` below the twin `root`; modules in between become twins."""
    *between, last = path.split(".")
    node = root
    for name in between:
        child = node._modules[name]
        assert child is not None
        if "_is_twin" not in child.__dict__:
            child = twin(child)
            child.__dict__["_is_twin"] = True
            node._modules[name] = child
        node = child
    node._modules[last] = leaf
