"""What a plan was made of, and whether that is still there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from offramp.engine.confidence import HEADS
from offramp.models.backbone import Backbone
from offramp.models.exits import ExitSet

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Stamp:
    """The decoder, LM head and exits of an adapter as they are now.

    It no longer holds once a module or a tensor is replaced or written in place, moved or converted
    (`.to()`), once a hook comes or goes, LoRA is put in, switched or merged, a module is set to
    train, or attention, decoding options or what the self-check found change. What is written
    through `tensor.data` in place goes unseen: PyTorch does not count it.
    """

    def __init__(self, backbone: Backbone, exits: ExitSet | None) -> None:
        self._backbone, self._exits = backbone, exits
        modules = [*_modules(backbone, exits)]
        own = self._own = [module.__dict__ for module in modules]
        self._children = [each["_modules"] for each in own]
        self._tensors = [each[name] for each in own for name in ("_parameters", "_buffers")]
        self._hooks = [each[name] for each in own for name in _HOOKS]
        self._adapted = [m for m in modules if hasattr(m, "merged_adapters")]  # layers of PEFT's
        # Kept, so that no other can come to their addresses.
        self._held = [[*table.values()] for table in (*self._children, *self._tensors)]
        self._seen = self._look()

    def holds(self, backbone: Backbone, exits: ExitSet | None) -> bool:
        """Return True if these are the same, and nothing about them has changed."""
        same = backbone is self._backbone and exits is self._exits
        return same and self._look() == self._seen

    def _look(self) -> list[Any]:
        backbone = self._backbone
        found: list[Any] = [
            backbone.decoding, backbone.engine, backbone.lossless, backbone.family, backbone.tower,
            getattr(backbone.text_config, "_attn_implementation", None), *HEADS.items(),
        ]  # fmt: skip
        found += [each["training"] for each in self._own]
        found += [id(each["forward"]) for each in self._own if "forward" in each]
        found += [id(child) for table in self._children for child in table.values()]
        found += [key for table in self._hooks for key in table]
        found += [written(tensor) for table in self._tensors for tensor in table.values()]
        found += [_switches(layer) for layer in self._adapted]
        return found


def _modules(backbone: Backbone, exits: ExitSet | None) -> Iterator[nn.Module]:
    """The modules between the model and its decoder, those of the decoder, the head and exits."""
    path, module = backbone.family.stack.split("."), backbone.model
    for name in path:
        yield module
        module = getattr(module, name)
    yield from backbone.stack.modules()
    yield from backbone.head.modules()
    if exits is not None:
        yield from exits.modules.modules()


def written(tensor: Tensor | None) -> Any:
    """Return which tensor it is, where its values are, and how often they were written in place."""
    if tensor is None:
        return None
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # a subclass that holds several
        address = 0
    return id(tensor), address, 0 if tensor.is_inference() else tensor._version


def _switches(layer: Any) -> Any:
    return (
        tuple(layer.merged_adapters), layer.disable_adapters, tuple(layer.active_adapters),
        tuple(getattr(layer, "scaling", {}).items()),
    )  # fmt: skip
