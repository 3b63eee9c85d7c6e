"""What a plan was made of, and whether that is still there."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from offramp.engine.confidence import HEADS
from offramp.engine.executors.bare import GLOBAL_HOOKS
from offramp.models.backbone import Backbone
from offramp.models.exits import ExitSet
from offramp.models.weights_version import Unchanged


class Stamp:
    """The decoder, LM head and exits of an adapter as they are now.

    It no longer holds once a module or a tensor is replaced or written in place, moved or converted
    (`.to()`), once a hook comes or goes, of a module or of all of them, LoRA is put in, switched or
    merged, a module is set to train, or attention, decoding options or what the self-check found
    change. What is written through `tensor.data` in place goes unseen: PyTorch does not count it.
    """

    def __init__(self, backbone: Backbone, exits: ExitSet | None) -> None:
        self._backbone, self._exits = backbone, exits
        self._unchanged = Unchanged(partial(_modules, backbone, exits))
        self._settings = self._look()

    def holds(self, backbone: Backbone, exits: ExitSet | None) -> bool:
        """Return True if these are the same, and nothing about them has changed."""
        same = backbone is self._backbone and exits is self._exits
        return same and self._look() == self._settings and self._unchanged()

    def _look(self) -> list[Any]:
        backbone = self._backbone
        return [
            backbone.decoding, backbone.engine, backbone.lossless, backbone.reads_in_parts,
            backbone.family, backbone.tower,
            getattr(backbone.text_config, "_attn_implementation", None), *HEADS.items(),
            *map(tuple, GLOBAL_HOOKS),
        ]  # fmt: skip


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
