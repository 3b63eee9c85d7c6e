"""Photographs decoded no larger than a model looks at them.

A camera's JPEG has many times the pixels that a processor makes of it. Its decoder can give it at a
half, a quarter or an eighth of its size, for a part of the time, and what the processor then makes
of it differs by rounding. As answers may differ with that, it is an option, and part of what is
calibrated.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from PIL import Image
from torch import Tensor

from offramp.core.errors import InputError
from offramp.features.input_processor import SMALLEST

TIMES = 2
"""How many times as large as the processor's own a side stays, at least."""
_TRIED = ((512, 512), (2048, 768))


def with_shrink_on_load(processor: Any) -> Any:
    """Return a copy of a processor that decodes images no larger than it needs them.

    Raises:
        InputError: the processor cuts large images into parts, or takes no images.
    """
    smallest = TIMES * _side(processor)
    made = copy.copy(processor)
    made.__dict__[SMALLEST] = smallest
    return made


def _side(processor: Any) -> int:
    """The longest side that a processor brings images to. Found out on two that differ in shape:
    one that tiles makes more of the larger."""
    look = getattr(processor, "image_processor", None)
    if look is None:
        raise InputError(
            f"{type(processor).__name__} reads no images to shrink on load.",
            "Leave shrink_on_load (--shrink-on-load) out for this model.",
        )
    made = [look(images=Image.new("RGB", size, "gray"), return_tensors="pt") for size in _TRIED]
    pixels = made[0].get("pixel_values")
    one, other = map(_shapes, made)
    if one != other or not isinstance(pixels, Tensor) or pixels.dim() != 4 or len(pixels) != 1:
        raise InputError(
            f"{type(look).__name__} looks at large images in parts, so all their pixels count.",
            "Leave shrink_on_load (--shrink-on-load) out for this model.",
        )
    return max([*map(int, pixels.shape[2:]), *_named(getattr(look, "size", None))])


def _shapes(made: Mapping[str, Any]) -> dict[str, Any]:
    return {name: getattr(value, "shape", None) for name, value in made.items()}


def _named(size: Any) -> list[int]:
    """The sides of a processor's `size`, to which it may resize before it crops."""
    names = ("height", "width", "shortest_edge", "longest_edge")
    sides = [getattr(size, name, None) for name in names]
    if isinstance(size, Mapping):
        sides = [size.get(name) for name in names]
    return [side for side in sides if isinstance(side, int)]
