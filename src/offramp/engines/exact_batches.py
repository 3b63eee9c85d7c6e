"""Tokens that are the same to the last bit whatever is decoded beside them."""

from __future__ import annotations

from typing import Any

from offramp.adapter import Adapter
from offramp.models.prepack import prepack


def open(model: Any, **_: Any) -> Any:
    """The model, exact in any company, its weights laid out in place."""
    if isinstance(model, Adapter):
        return model.with_exact_batches()
    prepack(model, every=True)
    return model.with_decoding(exact_batches=True)
