"""The sizes of a model that a person wants to know."""

from __future__ import annotations

from itertools import chain
from typing import Any

from torch import nn

from offramp.core.models.backbone import Backbone
from offramp.core.models.weights import held_plainly, is_quantized, scheme


def describe(backbone: Backbone) -> dict[str, Any]:
    """Return the sizes to know before attaching exits: of layers, states and vocabulary, and bytes
    in the backbone's dtype."""
    layer = float_values(backbone.layers[-1]) * backbone.dtype.itemsize
    return {
        "name": backbone.name,
        "model_type": backbone.model.config.model_type,
        "text_model_type": backbone.text_config.model_type,
        "encoder_decoder": backbone.is_encoder_decoder,
        "layers": backbone.depth,
        "width": backbone.width,
        "vocabulary": backbone.vocabulary,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "quantized": scheme(backbone.layers),
        "weight_bytes": weight_bytes(backbone.model),
        "parameters": float_values(backbone.model),
        "exit_bytes": layer,
    }


def weight_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's weights, shared ones counted once."""
    held = {id(t): t for t in chain(module.parameters(), module.buffers())}
    return sum(t.nbytes for t in held.values())


def float_values(module: nn.Module) -> int:
    """Return the number of values in a module's float copy, shared ones counted once."""
    values: dict[int, int] = {}
    for part in module.modules():
        if is_quantized(part):
            linear: Any = part
            values[id(part)] = linear.in_features * linear.out_features
        values |= {id(t): t.numel() for t in held_plainly(part).values() if t is not None}
    return sum(values.values())
