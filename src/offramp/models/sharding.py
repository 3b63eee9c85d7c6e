"""accelerate's hooks: what `device_map` hangs around modules whose weights are on several devices.

A hook takes the place of a module's `forward`: it moves what comes in to where the module runs, and
brings offloaded weights there for the call. A layer is called through its own hook, so that works;
a twin needs its hooks around itself, and an exit, which accelerate does not know, hooks like those
of the layer that it stands before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, update_wrapper
from types import MethodType
from typing import Any

import torch
from torch import nn

from offramp.errors import UnsupportedBackboneError

_HOOKED = ("_hf_hook", "_old_forward", "forward")
"""What a hook leaves in a module, besides itself."""


def has_hook(module: nn.Module) -> bool:
    """Return True if accelerate hung a hook around this module."""
    return "_hf_hook" in vars(module)


def check_hooks(model: nn.Module) -> None:
    """Raise `UnsupportedBackboneError` where a hook does not lie around a module's own forward."""
    for path, module in model.named_modules():
        if has_hook(module) and not _is_known(module):
            kind = type(module._hf_hook).__name__
            raise UnsupportedBackboneError(
                f"The hook {kind} at {path or 'the model'} does more than move tensors.",
                "Load the model by from_pretrained with a device_map, or on one device.",
            )


def _is_known(module: Any) -> bool:
    from accelerate.hooks import AlignDevicesHook

    return isinstance(module._hf_hook, AlignDevicesHook) and (
        isinstance(module._old_forward, MethodType) and isinstance(module.forward, partial)
    )


def hook_twin(made: Any) -> None:
    """Hang the hook of a module around its twin `made`, which has taken over all its attributes."""
    if has_hook(made):
        own = made.__dict__["_old_forward"] = MethodType(made._old_forward.__func__, made)
        made.__dict__["forward"] = update_wrapper(partial(made.forward.func, made), own)


def device_of(module: nn.Module) -> torch.device:
    """Return where a module runs: as its hook says, or where its parameters are."""
    for part in module.modules():
        device = getattr(vars(part).get("_hf_hook"), "execution_device", None)
        if device is not None:
            return torch.device(device)
        for parameter in part._parameters.values():
            if parameter is not None:
                return parameter.device
    return torch.device("cpu")


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """Bring the module's offloaded weights to where it runs, for as long as this is open."""
    hooks = [
        (part, part._hf_hook)
        for part in module.modules()
        if getattr(vars(part).get("_hf_hook"), "offload", False)
    ]
    for part, hook in hooks:
        hook.pre_forward(part)  # type: ignore[operator, union-attr]
    try:
        yield
    finally:
        for part, hook in hooks:
            hook.post_forward(part, None)  # type: ignore[operator, union-attr]


def hooks_of(module: nn.Module) -> dict[int, Any]:
    """The hooks in a module by id: for `deepcopy`, so that what they hold is not copied."""
    hooks = [part._hf_hook for part in module.modules() if has_hook(part)]
    return {id(hook): hook for hook in hooks}


def unhook(module: nn.Module) -> None:
    """Take the hooks off a copy, and leave its weights where they are."""
    for part in module.modules():
        if has_hook(part):
            for name in _HOOKED:
                part.__dict__.pop(name, None)


def run_like(module: nn.Module, layer: nn.Module) -> None:
    """Let `module` run where `layer` does; if hooks move what comes to that, hang one around it."""
    module.to(device_of(layer))
    hook: Any = vars(layer).get("_hf_hook")
    if hook is not None:
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        own = AlignDevicesHook(execution_device=device_of(layer), skip_keys=hook.skip_keys)
        add_hook_to_module(module, own)
