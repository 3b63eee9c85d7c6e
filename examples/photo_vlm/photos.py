"""Photographs as the tower sees them, and the features of many, computed once."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from offramp.core.errors import DataError
from offramp.core.storage import digest_rows, read_json, write_json
from offramp.inputs.example import Example
from offramp_photo.build import image_processor
from offramp_photo.tower import FEATURES, GRID

AT_ONCE = 8
"""Photographs whose maps stay in the processor's cache."""


class Features:
    """Feature maps [49, 1280] of many photographs, in one float16 file."""

    def __init__(self, work: Path) -> None:
        """Raise `DataError` where the cache is missing or not whole."""
        card = read_json(work / "features.json")
        self.places = {name: place for place, name in enumerate(card["photographs"])}
        self._maps = np.load(work / "features.npy", mmap_mode="r")
        if self._maps.shape != (len(self.places), GRID**2, FEATURES):
            raise DataError(
                f"{work / 'features.npy'} does not hold {len(self.places)} photographs.",
                "Remove features.npy and features.json; they are computed again.",
            )

    def __getitem__(self, places: Sequence[int]) -> Tensor:
        return torch.from_numpy(self._maps[list(places)]).float()


def cache_features(net: nn.Module, examples: Sequence[Example], work: Path, say: Any) -> Features:
    """Compute what the cache does not have yet; the card is written last, so half a cache is none.

    say: called with the size before anything is written, and with the progress.
    """
    photographs = {example.group: example for example in examples}
    wanted = digest_rows([name] for name in photographs)
    card = work / "features.json"
    if card.is_file() and read_json(card)["digest"] == wanted:
        return Features(work)
    size = len(photographs) * GRID**2 * FEATURES * 2
    say(f"features of {len(photographs)} photographs: {size / 1e6:.0f} MB in {work}")
    work.mkdir(parents=True, exist_ok=True)
    shape = (len(photographs), GRID**2, FEATURES)
    maps = np.lib.format.open_memmap(work / "features.npy", "w+", np.float16, shape)
    net = net.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    shown = list(photographs.values())
    for start in range(0, len(shown), AT_ONCE):
        images = [example.open_image() for example in shown[start : start + AT_ONCE]]
        maps[start : start + AT_ONCE] = features_of(net, images).half().numpy()
        if (start + AT_ONCE) % 1024 == 0:
            say(f"  {start + AT_ONCE} of {len(shown)}")
    maps.flush()
    write_json(card, {"digest": wanted, "photographs": list(photographs)})
    return Features(work)


def varied(image: Image.Image, draw: random.Random, *, mirror: bool) -> Image.Image:
    """A part of at least two thirds of an image, at times mirrored."""
    width, height = image.size
    share = draw.uniform(0.82, 1.0)
    left, top = (draw.uniform(0, (1 - share) * side) for side in image.size)
    box = (left, top, left + share * width, top + share * height)
    part = image.resize(image.size, Image.Resampling.BILINEAR, box=box)
    return ImageOps.mirror(part) if mirror and draw.random() < 0.5 else part


@torch.inference_mode()
def features_of(net: nn.Module, images: Sequence[Image.Image]) -> Tensor:
    """Feature maps [B, 49, 1280] of opened images."""
    dtype = next(net.parameters()).dtype
    pixels = image_processor()(list(images), return_tensors="pt")["pixel_values"].to(dtype)
    features: Tensor = net(pixels.contiguous(memory_format=torch.channels_last)).float()
    return features
