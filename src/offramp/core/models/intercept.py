"""Intercepts the decoder layers of a vision-language model: a handler decides what each one does.

Nothing of the user's model is ever patched. An intercepted model is a chain of shallow twins of the
modules from the root down to the decoder layers; the twins share every parameter and buffer with
the original, and the twin stack's layers are thin wrappers that ask a *handler* what to do. Each
generation has an intercepted model and a handler of its own, so generation is thread-safe.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor, nn

from offramp.core.models.discovery.twin import graft, twin
from offramp.core.models.in_place_of import InPlaceOf
from offramp.core.models.opened import LayerCall, OpenedModel
from offramp.core.models.rope import LengthDependentRope, with_own_frequencies


class LayerHandler(Protocol):
    """An object that decides at each call of a decoder layer what is computed."""

    def layer(self, call: LayerCall) -> Any:
        """Return the layer's output to the stack, or a value in its place."""
        ...


class _LayerStandIn(InPlaceOf):
    """Stands where a decoder layer stood in the twin stack and hands its calls to the handler."""

    def __init__(self, index: int, layer: nn.Module, handler: LayerHandler) -> None:
        super().__init__(layer)
        self.__dict__.update(_index=index, _handler=handler)

    def __call__(self, *args: Any, **kw: Any) -> Any:
        if not args:  # some stacks name everything
            args = (kw.pop(next(iter(inspect.signature(self._own.forward).parameters))),)
        return self._handler.layer(LayerCall(self._index, self._own, args[0], args[1:], kw))


def stand_ins(backbone: OpenedModel, handler: LayerHandler) -> nn.Module:
    """Return a module list for the stack, whose layers ask `handler` at each call."""
    made = [_LayerStandIn(i, layer, handler) for i, layer in enumerate(backbone.layers)]
    if backbone.layer_names is None:
        return nn.ModuleList(made)
    return nn.ModuleDict(dict(zip(backbone.layer_names, made, strict=True)))


class _HeadStandIn(InPlaceOf):
    """The LM head, always applied to a 2-D row.

    A frozen half-precision head on a slice `h[:, -1:]` takes torch's batched path on CPU, which
    copies the whole weight: 14 to 40 times slower than the same rows as a matrix. Where the handler
    has a prompt wait at an exit (`waits`), nobody reads the logits: they are zeros.
    """

    def __init__(self, head: nn.Module, handler: LayerHandler) -> None:
        super().__init__(head)
        self.__dict__["_handler"] = handler

    def __call__(self, hidden: Tensor) -> Tensor:
        words = getattr(self._own, "out_features", None)
        if words is not None and getattr(self._handler, "waits", None) is not None:
            return hidden.new_zeros(1).expand(*hidden.shape[:-1], words)
        if hidden.dim() == 3 and hidden.shape[1] == 1:
            return self._own(hidden[:, 0])[:, None]  # type: ignore[no-any-return]
        return self._own(hidden)  # type: ignore[no-any-return]


class ImageMemory(Protocol):
    """A store of image features that a vision tower computed."""

    def before(self, tower: nn.Module) -> nn.Module:
        """Return a module for the tower's place, which calls the tower only for unknown images."""
        ...


class InterceptedModel:
    """A VLM whose layers ask a handler; runs whole, or the decoder stack alone."""

    def __init__(self, backbone: OpenedModel, handler: LayerHandler) -> None:
        family = backbone.family
        backbone.seat()
        root = twin(backbone.model)
        graft(root, f"{family.stack}.{family.layers}", stand_ins(backbone, handler))
        graft(root, family.head, _HeadStandIn(backbone.reader, handler))
        if backbone.tower is not None:
            graft(root, str(family.vision), backbone.tower)
            for path, part in backbone.tower.beside.items():
                graft(root, path, part)
        self.backbone = backbone
        self.model: Any = root
        self.stack: Any = root.get_submodule(family.stack)
        if backbone.read_as:
            self.stack.register_forward_pre_hook(self._as_read, with_kwargs=True)
        if backbone.rope != LengthDependentRope():
            with_own_frequencies(root, family.stack)

    def _as_read(
        self, _: nn.Module, args: tuple[Any, ...], kw: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Ids with which the stack is called, as the model would have read them."""
        ids = kw.get("input_ids")
        return args, kw if ids is None else {**kw, "input_ids": self.backbone.as_read(ids)}

    def remember_images(self, backbone: OpenedModel, memory: ImageMemory) -> None:
        """Put `memory` before the vision tower. Raise `InputError` if the tower is not known."""
        graft(self.model, str(backbone.family.vision), memory.before(backbone.vision))

    @cached_property
    def _names(self) -> list[str]:
        """Of the arguments that the stack takes."""
        return [*inspect.signature(type(self.stack).forward).parameters][1:]

    @contextmanager
    def recording(self) -> Iterator[list[dict[str, Any]]]:
        """Collect the keyword arguments with which the stack is called."""
        calls: list[dict[str, Any]] = []

        def note(_: nn.Module, args: tuple[Any, ...], kw: dict[str, Any]) -> None:
            calls.append({**dict(zip(self._names, args, strict=False)), **kw})

        handle = self.stack.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield calls
        finally:
            handle.remove()
