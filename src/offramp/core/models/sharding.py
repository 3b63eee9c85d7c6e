"""Weights that are not all here: on other devices of this process, or with other processes.

*accelerate's hooks* are what `device_map` hangs around modules whose weights are on several
devices. A hook takes the place of a module's `forward`: it moves what comes in to where the module
runs, and brings offloaded weights there for the call. A layer is called through its own hook, so
that works; a twin needs its hooks around itself, and an exit, which accelerate does not know, hooks
like those of the layer that it stands before.

*Tensor parallel* (transformers) and *FSDP2* (`torch.distributed.fsdp.fully_shard`) split each
weight over processes: parameters are `DTensor`. Layers are called as
they are. What is copied from a layer is copied from its full tensors, which all processes must
gather together.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial, update_wrapper
from types import MethodType
from typing import Any

import torch
from torch import Tensor, distributed, nn

from offramp.core.errors import UnsupportedBackboneError

_HOOKED = ("_hf_hook", "_old_forward", "forward")
"""What a hook leaves in a module, besides itself."""


def has_hook(module: nn.Module) -> bool:
    """Return True if accelerate hung a hook around this module."""
    return "_hf_hook" in vars(module)


def check_hooks(model: nn.Module) -> None:
    """Raise `UnsupportedBackboneError` where a hook does not surround a module's own forward."""
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
    """Put the module's hook around its twin `made`, which already has all its attributes."""
    if has_hook(made):
        own = made.__dict__["_old_forward"] = MethodType(made._old_forward.__func__, made)
        made.__dict__["forward"] = update_wrapper(partial(made.forward.func, made), own)


def device_of(module: nn.Module) -> torch.device:
    """Return the device on which a module runs: its hook's, or that of its parameters."""
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
    """Bring the module's offloaded weights to its device, while this context is open."""
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
    """Return the hooks in a module by id, for `deepcopy` to leave them uncopied."""
    hooks = [part._hf_hook for part in module.modules() if has_hook(part)]
    return {id(hook): hook for hook in hooks}


def unhook(module: nn.Module) -> None:
    """Remove the hooks from a copy, and leave its weights where they are."""
    for part in module.modules():
        if has_hook(part):
            for name in _HOOKED:
                part.__dict__.pop(name, None)


def run_like(module: nn.Module, layer: nn.Module) -> None:
    """Make `module` run on the device of `layer`, by a hook on its inputs if `layer` has one."""
    module.to(device_of(layer))
    hook: Any = vars(layer).get("_hf_hook")
    if hook is not None:
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        own = AlignDevicesHook(execution_device=device_of(layer), skip_keys=hook.skip_keys)
        add_hook_to_module(module, own)


# -- weights that processes split -----------------------------------------------------------------

_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_STATE = "__composable_api_state_key"
"""How the names begin under which FSDP2 keeps its state in a module."""
_unread: ContextVar[bool] = ContextVar("unread", default=False)


def _together() -> bool:
    """Whether there are processes to split weights between."""
    return distributed.is_available() and distributed.is_initialized()


def is_fsdp(module: nn.Module) -> bool:
    """Return True if FSDP2 splits this module."""
    if not _together():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def is_dtensor(tensor: Tensor | None) -> bool:
    """Return True if this process holds only a part of the tensor."""
    if not _together():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def is_split(module: nn.Module) -> bool:
    """Return True if several processes hold parts of the module's weights."""
    return _together() and (
        any(map(is_dtensor, module.parameters())) or any(map(is_fsdp, module.modules()))
    )


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def full(tensor: Tensor) -> Tensor:
    """Return the whole tensor, gathered by all processes together; an empty one in `unread`."""
    if not is_dtensor(tensor):
        return tensor
    if _unread.get():
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return tensor.full_tensor()  # type: ignore[no-any-return, attr-defined]


@contextmanager
def unread() -> Iterator[None]:
    """Gather nothing inside this context: one process may make copies alone, whose values are
    loaded afterwards."""
    token = _unread.set(True)
    try:
        yield
    finally:
        _unread.reset(token)


@torch.no_grad()
def gathered(module: nn.Module) -> nn.Module:
    """Return the module itself or, where processes split it, a stand-in with the full tensors and
    without FSDP2's class, hooks and `forward`."""
    return _whole(module, {}) if is_split(module) else module


def _whole(module: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    if module in made:
        return made[module]
    kind: Any = type(module)
    own = kind.__mro__[2] if is_fsdp(module) else kind  # after FSDP2's own two
    whole: Any = object.__new__(own)
    made[module] = whole
    inside = dict(module.__dict__)
    if inside.pop("_is_hooked", False):  # tensor parallel
        inside.pop("forward", None)
    inside = {name: value for name, value in inside.items() if not name.startswith(_STATE)}
    inside |= {table: OrderedDict() for table in _TABLES}
    inside["_parameters"] = {
        name: None if it is None else nn.Parameter(full(it.detach()), requires_grad=False)
        for name, it in module._parameters.items()
    }
    inside["_modules"] = {
        name: None if part is None else _whole(part, made) for name, part in module._modules.items()
    }
    whole.__dict__.update(inside)
    return whole  # type: ignore[no-any-return]


@torch.inference_mode(False)
@torch.no_grad()
def keep_layers_alone_split(model: Any, layers: Sequence[nn.Module]) -> None:
    """Gather permanently what FSDP2 splits besides the layers, because code calls these parts
    without FSDP2's hooks. Layers are freed after each call.

    Raises:
        UnsupportedBackboneError: layers that are no units of FSDP2 of their own, beside others.
    """
    if not any(map(is_fsdp, model.modules())):
        return
    units: list[Any] = [part for layer in layers for part in layer.modules() if is_fsdp(part)]
    if not all(map(is_fsdp, layers)):
        raise UnsupportedBackboneError(
            f"FSDP2 splits {type(model).__name__}, and its decoder layers are no units of it.",
            "Call fully_shard(layer) for each decoder layer, before any module around them.",
        )
    for part in model.modules():
        if is_fsdp(part):  # the outermost first, which may not be the first to run here
            part._get_fsdp_state()._lazy_init()
    for unit in units:
        unit.set_reshard_after_forward(True, recurse=False)
        unit.unshard()  # memory that is first taken in inference mode would be of no use beside it
        unit.reshard()
    for part in model.modules():
        if is_fsdp(part) and part not in units:
            part.set_reshard_after_forward(False, recurse=False)
            part.set_reshard_after_backward(False, recurse=False)
            part.unshard()


def free(layer: Any) -> None:
    """Free the weights that FSDP2 gathered for an interrupted call."""
    if is_fsdp(layer):
        layer.reshard()
