"""Tokens that are the same to the last bit whatever is decoded beside them: alone, or in a
`BatchEngine` with any requests. Prompts are read one at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from offramp.adapter.adapter import Adapter
from offramp.engines.packed import prepack
from offramp.features.exact_batches import EXACT_BATCHES


def open(model: Any, **_: Any) -> Any:
    """Return the model with its weights laid out in place, exact in any batch."""
    backbone, exits = (model.backbone, model.exits) if isinstance(model, Adapter) else (model, None)
    prepack(backbone, exits, every=True)
    exact = backbone.with_decoding(exact_batches=EXACT_BATCHES)
    return exact if exits is None else replace(model, backbone=exact)
