"""Copies of an image that are no longer the same pixels: encoded again, or at another size.

Small thumbnails find pairs that may be copies. Charts, pages and forms share theirs without being
copies, so a pair counts only where no cell of the image differs at a resolution that shows a
letter (`SIDE_SHARP`).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from offramp.common.progress import progress
from offramp.inputs.example import Example

log = logging.getLogger(__name__)
Array = npt.NDArray[Any]

SIDE = 8
"""Pixels a side of the thumbnails that candidates are found by."""
NEAR = 2.5
"""Largest difference of two copies' thumbnails, the root mean square over pixels and channels, of
255. JPEG at quality 50 and sizes from half to double moved scenes of 72 pixels by at most 1.9 and
photographs by 0.8; the nearest two of 2,000 different scenes were 3.4 apart, of 600 photographs 18,
and all of 300 line charts lay nearer than that.
"""
SIDE_SMALL, SMALL_CELL = 64, 8
SIDE_SHARP, SHARP_CELL = 512, 4
"""Largest side of what is compared, and pixels a side of its cells: first small, then sharp."""
NOISE, BLUR = 8.0, 0.35
"""By how much a cell of a copy may differ: so many of 255 grey levels, and this share of the cell's
own contrast, which another encoding or size moves."""
SMALL_ALIKE, SHARP_ALIKE = 1.0, 1.35
"""How often that allowance two copies may differ: small in the worst cell, sharp in the second
worst, so that a single pixel makes no other image. Copies (JPEG at quality 50 to
85, sizes from half to double, both) of charts, pages, forms, scenes and photographs reached 0.83
small and 1.30 sharp; the nearest two of 60 line charts, 60 text pages and 40 scatter charts were
0.89 to 1.2 and 3.8 to 6.0 apart, of 60 forms with another number filled in 1.4 sharp.
"""
MOST_PAIRS = 200_000
"""Pairs that are compared sharply, a few minutes' work; of more, the nearest."""
MOST_SMALL, MOST_SHARP = 1000, 32
"""With how many others an image is compared, small and then sharply: those most like it. Scans of
one form are all alike, and their pairs too many; their thumbnails say little of which are copies,
the worst cell does: of 300 forms a copy's was always the own one's nearest."""


@dataclass(frozen=True)
class Grey:
    """Grey levels of an image by cell, softened a little so that resampling counts less than ink.

    levels: [cells, pixels]. allowed: how much each cell of a copy may differ [cells].
    """

    levels: Array
    allowed: Array

    @classmethod
    def of(cls, image: Image.Image, size: tuple[int, int], cell: int) -> Grey:
        """Return the grey levels of an image. size: width and height for the comparison, in whole
        cells. cell: pixels a side."""
        small = image.convert("L").resize(size, Image.Resampling.BILINEAR)
        x = np.pad(np.asarray(small, dtype=np.float32), 1, mode="edge")
        rows = x[:-2, 1:-1] + 2 * x[1:-1, 1:-1] + x[2:, 1:-1]
        columns = x[1:-1, :-2] + 2 * x[1:-1, 1:-1] + x[1:-1, 2:]
        height, width = size[1] // cell, size[0] // cell
        cells = ((rows + columns) / 8).reshape(height, cell, width, cell).swapaxes(1, 2)
        levels = np.ascontiguousarray(cells.reshape(height * width, cell * cell))
        return cls(levels, NOISE + BLUR * levels.std(1))

    def differ(self, other: Grey) -> Array:
        """Return the second largest and the largest difference of cells from another image, in
        units of the allowed difference [2]."""
        ratios = _differ(self.levels, other.levels, self.allowed, other.allowed)
        return np.asarray(np.partition(ratios, -2)[-2:])


def _differ(one: Array, other: Array, allowed: Array, others_allowed: Array) -> Array:
    """Return by how many allowances each cell of images [..., cells, pixels] differs [...,
    cells]."""
    apart = one - other
    squares = np.einsum("...cp,...cp->...c", apart, apart) / apart.shape[-1]
    return np.asarray(np.sqrt(squares) / np.maximum(allowed, others_allowed))


@dataclass(frozen=True)
class Look:
    """The part of an image that is kept for finding its copies.

    thumbnail: [3 * SIDE * SIDE]. small: its grey levels. size: of the image, in pixels.
    """

    thumbnail: Array
    small: Grey
    size: tuple[int, int]

    @classmethod
    def of(cls, image: Image.Image) -> Look:
        """Return the look of an upright 8-bit RGB image."""
        thumbnail = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        return cls(
            np.asarray(thumbnail, dtype=np.float32).ravel(),
            Grey.of(image, (SIDE_SMALL, SIDE_SMALL), SMALL_CELL),
            image.size,
        )

    def alike(self, other: Look) -> bool:
        """Return True if, by their thumbnails, two images may be copies."""
        distance = np.sqrt(np.mean((self.thumbnail - other.thumbnail) ** 2))
        return bool(distance <= NEAR) and bool(self.small.differ(other.small)[1] <= SMALL_ALIKE)


def copied(one: Image.Image, other: Image.Image) -> bool:
    """Return True if two upright 8-bit images, in colour or grey, are copies; for images that may
    be copies."""
    size = _common(one.size, other.size)
    return _same(Grey.of(one, size, SHARP_CELL), Grey.of(other, size, SHARP_CELL))


def _same(one: Grey, other: Grey) -> bool:
    return bool(one.differ(other)[0] <= SHARP_ALIKE)


def near_copies(
    examples: Sequence[Example], known: Sequence[Look | None] | None = None
) -> list[tuple[int, int]]:
    """Return pairs of places of examples whose images are copies; prompts without an image have
    none.

    known: looks of images by place, if known.

    Raises:
        DataError: an image cannot be read.
    """
    places = [place for place, example in enumerate(examples) if not example.is_text]
    if len(places) < 2:
        return []
    found = [known[place] if known else None for place in places]
    looks = [
        look or Look.of(examples[place].open_image())
        for place, look in zip(places, found, strict=True)
    ]
    pairs = _nearest(np.stack([look.thumbnail for look in looks]))
    pairs, apart = _small_alike([look.small for look in looks], pairs)
    few = _few(pairs, apart)
    if len(few) < len(pairs):
        log.warning(
            "%d pairs of images look alike; the nearest %d are compared for copies.",
            len(pairs),
            len(few),
        )
    pairs = pairs[few]

    @lru_cache(1024)
    def sharp(place: int, size: tuple[int, int]) -> Grey:
        return Grey.of(examples[places[place]].open_image(), size, SHARP_CELL)

    def same(a: int, b: int) -> bool:
        size = _common(looks[a].size, looks[b].size)
        return _same(sharp(a, size), sharp(b, size))

    shown = progress(pairs.tolist(), "comparing images that look alike")
    return [(places[a], places[b]) for a, b in shown if same(a, b)]


def _common(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    """The size that both are compared at: that of the smaller, with sides of `SIDE_SHARP` at most;
    whole cells, at least two a side."""
    sides = min(one[0], other[0]), min(one[1], other[1])
    scale = min(1.0, SIDE_SHARP / max(sides))
    width, height = (max(2, round(side * scale / SHARP_CELL)) * SHARP_CELL for side in sides)
    return width, height


def _nearest(thumbnails: Array) -> Array:
    """Pairs of places [P, 2] whose thumbnails may be of copies, ascending: of each, the
    `MOST_SMALL` nearest."""
    from scipy.spatial import cKDTree

    tree, n = cKDTree(thumbnails), len(thumbnails)
    reach = np.nextafter(NEAR * thumbnails.shape[1] ** 0.5, np.inf)  # which is not reached itself
    found = [np.zeros((0, 2), dtype=np.int64)]
    for start in range(0, n, 1024):
        some = thumbnails[start : start + 1024]
        _, others = tree.query(some, k=min(n, MOST_SMALL + 1), distance_upper_bound=reach)
        own = np.broadcast_to(np.arange(start, start + len(some))[:, None], others.shape)
        there = (others < n) & (others != own)
        found.append(np.sort(np.stack([own[there], others[there]], 1), axis=1))
    return np.unique(np.concatenate(found), axis=0)


def _small_alike(small: Sequence[Grey], pairs: Array) -> tuple[Array, Array]:
    """The pairs that stay candidates, and how far apart their worst cells are."""
    levels = np.stack([grey.levels for grey in small])
    allowed = np.stack([grey.allowed for grey in small])
    worst = [np.zeros(0)]
    for start in progress(range(0, len(pairs), 1024), "comparing thumbnails"):
        a, b = pairs[start : start + 1024].T
        worst.append(_differ(levels[a], levels[b], allowed[a], allowed[b]).max(-1))
    apart = np.concatenate(worst)
    alike = apart <= SMALL_ALIKE
    return pairs[alike], apart[alike]


def _few(pairs: Array, apart: Array) -> Array:
    """Rows of the pairs [P, 2] that are compared sharply, ascending: the nearest `MOST_PAIRS` of
    those that are among the nearest `MOST_SHARP` of one of their images."""
    order = np.argsort(apart, kind="stable")
    seen: Counter[int] = Counter()
    kept = []
    for row, (a, b) in zip(order.tolist(), pairs[order].tolist(), strict=True):
        if min(seen[a], seen[b]) < MOST_SHARP:
            kept.append(row)
        seen[a] += 1
        seen[b] += 1
    return np.sort(np.array(kept[:MOST_PAIRS], dtype=np.int64))
