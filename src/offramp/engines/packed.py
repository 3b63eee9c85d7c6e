"""Weights laid out for the matrix products of a CPU: the same numbers, read faster."""

from __future__ import annotations

from typing import Any

from torch import nn

from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import ExitSet
from offramp.features.quantized.prepacked import is_worth_it, prepacked


def open(model: Any, **_: Any) -> Any:
    """Return the model with its weights laid out in place."""
    prepack(getattr(model, "backbone", model), getattr(model, "exits", None))
    return model


def prepack(backbone: Backbone, exits: ExitSet | None = None, *, every: bool = False) -> None:
    """Lay out the weights of decoder layers, exits and LM head in place and permanently.

    One weight after the other, so that at most one is held twice. The model's own head and its
    embeddings keep their weights, which they often share. For inference alone.

    every: also where the plain layout is faster, because in this layout a token's result does not
    depend on the tokens beside it (`DecodeOptions.exact_batches`).

    Raises:
        InputError: the model is not on a CPU, or in a precision that this CPU cannot multiply in.
    """
    backbone.check_whole("A layout for a processor")
    if backbone.reader is backbone.head and type(backbone.head) is nn.Linear:
        backbone.read_by(prepacked(backbone.head))
    for module in (backbone.layers, *([] if exits is None else [exits.modules])):
        for parent in module.modules():
            for name, part in parent.named_children():
                if type(part) is nn.Linear and (every or is_worth_it(part.weight)):
                    setattr(parent, name, prepacked(part))
