"""What a processor makes of a prompt's text, kept: the next image under it is only looked at.

A server is asked the same few prompts of ever new images. The token ids, the mask and the places of
the image in them are those of the time before, as long as the processor turns every image into
pixels of one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from cachetools import LRUCache
from torch import Tensor

TEXT, PIXELS = ("input_ids", "attention_mask"), "pixel_values"
MOST = 256
"""Texts that are kept; the least recently used is dropped."""


@dataclass
class _Kept:
    """Tensors by name, and whether the image processor alone was seen to make the rest."""

    text: dict[str, Tensor]
    shape: torch.Size
    proven: bool = False


class KeptTexts:
    """Processed texts of one processor, each with one image.

    A text is kept once the whole processor gave the same result twice, and the image processor
    alone gave the second image's pixels bit for bit. A processor with further outputs, such as
    tiles, or with pixels of changing shape is always called whole. Not for two threads at once.
    """

    def __init__(self, processor: Any) -> None:
        self._look = getattr(processor, "image_processor", None)
        self._kept: LRUCache[Any, _Kept] = LRUCache(MOST)
        self.hits: int = 0
        """How often the image alone was processed."""

    def batch(self, key: Any, image: Any, whole: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Return the result of `whole()`, for the text known by `key` and an image."""
        if self._look is None:
            return dict(whole())
        kept = self._kept.get(key)
        if kept is None or not kept.proven:
            return self._learn(key, kept, image, dict(whole()))
        pixels = self._pixels(image)
        if pixels is None or pixels.shape != kept.shape:
            del self._kept[key]
            return dict(whole())
        self.hits += 1
        return {**{name: tensor.clone() for name, tensor in kept.text.items()}, PIXELS: pixels}

    def _learn(
        self, key: Any, kept: _Kept | None, image: Any, made: dict[str, Any]
    ) -> dict[str, Any]:
        pixels = made.get(PIXELS)
        if {*made} != {*TEXT, PIXELS} or not isinstance(pixels, Tensor) or len(pixels) != 1:
            self._look = None  # its texts may depend on the image
            return made
        if kept is None:
            text = {name: made[name].clone() for name in TEXT}
            self._kept[key] = _Kept(text, pixels.shape)
            return made
        alone = self._pixels(image)
        same = all(torch.equal(made[name], kept.text[name]) for name in TEXT)
        if same and alone is not None and torch.equal(alone, pixels) and alone.shape == kept.shape:
            kept.proven = True
        else:
            self._look = None
        return made

    def _pixels(self, image: Any) -> Tensor | None:
        """What the image processor alone makes of an image; None where it makes something else."""
        assert self._look is not None
        made = self._look(images=image, return_tensors="pt")
        pixels = made.get(PIXELS)
        return pixels if {*made} == {PIXELS} and isinstance(pixels, Tensor) else None
