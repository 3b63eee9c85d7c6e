"""Copies of an image that are no longer the same file: encoded again, or at another size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from offramp.data.example import Example

SIDE = 8
"""Pixels a side of the thumbnails that are compared."""
NEAR = 2.5
"""Largest difference of two copies' thumbnails, the root mean square over pixels and channels, of
255. JPEG at quality 50 and sizes from half to double moved scenes of 72 pixels by at most 1.9 and
photographs by 0.8; the nearest two of 2,000 different scenes were 3.4 apart, of 600 photographs 18.
"""


def near_copies(examples: Sequence[Example]) -> list[tuple[int, int]]:
    """Pairs of places whose images look the same; prompts without an image have none.

    Raises:
        DataError: an image cannot be read.
    """
    from scipy.spatial import cKDTree

    places = [place for place, example in enumerate(examples) if not example.is_text]
    if len(places) < 2:
        return []
    tree = cKDTree(np.stack([_thumbnail(examples[place]) for place in places]))
    pairs = tree.query_pairs(NEAR * (3 * SIDE * SIDE) ** 0.5)
    return sorted((places[int(a)], places[int(b)]) for a, b in pairs)


def _thumbnail(example: Example) -> npt.NDArray[Any]:
    """The image as `SIDE` x `SIDE` means, in one row [3 * SIDE * SIDE]."""
    small = example.open_image().resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return np.asarray(small, dtype=np.float32).ravel()
