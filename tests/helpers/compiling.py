"""Models of two layers with an exit between them: compiling takes seconds a layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from offramp.models.backbone import Backbone
from offramp.models.exits import Exits
from offramp.research.benchmark.shapes import shape


def two_layers(name: str) -> tuple[Backbone, Exits, dict[str, Tensor]]:
    """Backbone, exits at depth 1, and inputs, of one of the mini shapes."""
    small = shape(name)
    config: Any = small.config()
    for size in ("num_hidden_layers", "num_layers", "num_decoder_layers"):
        if hasattr(config, size):
            setattr(config, size, 2)
    whole = type(small)("two", lambda: config, small.wrap).build()
    return whole, Exits(whole, (1,)).requires_grad_(False), dict(small.inputs(whole))
