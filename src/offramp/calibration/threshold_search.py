"""Threshold vectors for several exits: what could be tried, and in which order it is tested.

Pareto testing (Laufer-Goldshtein et al. 2023): one part of the data finds a path from safe to fast
through all candidates, another part tests the path from its safe end, so that what is guaranteed
does not pay for the size of the search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, product
from math import comb
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.calibration.replay import PolicyReplay
from offramp.core.decoding.policy import Thresholds

Array = npt.NDArray[Any]

LIMIT = 4096
"""Most candidates that are looked at."""
FEWEST = 4
"""Grid points below which larger sets of exits are given up first."""
STEP = 0.005
"""A point that saves less than this share of the seconds is no step of the path."""


def candidates(depths: Sequence[int], grid: Sequence[float]) -> list[Thresholds]:
    """Return all sets of exits, with all their combinations of thresholds of the grid.

    For more than `LIMIT` candidates the grid is thinned evenly, down to `FEWEST` points, and then
    the sets are limited to fewer exits, because many checks a token cost more than they save.
    """
    size, points = _affordable(len(depths), len(grid))
    spread = np.linspace(0, len(grid) - 1, points).round().astype(int)
    thin = [sorted(grid, reverse=True)[i] for i in spread]
    return [
        Thresholds(zip(places, values, strict=True))
        for k in range(1, size + 1)
        for places in combinations(sorted(depths), k)
        for values in product(thin, repeat=k)
    ]


def _affordable(exits: int, points: int) -> tuple[int, int]:
    """The largest sets of exits, then the finest grid, with at most `LIMIT` candidates."""
    for size in range(exits, 0, -1):
        for fewer in range(points, min(FEWEST, points) - 1, -1):
            if sum(comb(exits, k) * fewer**k for k in range(1, size + 1)) <= LIMIT:
                return size, fewer
    return 1, min(FEWEST, points)


def pareto_path(
    search: PolicyReplay,
    candidates: Sequence[Thresholds],
    seconds: Callable[[Array, Sequence[int]], float],
    grid: Sequence[float],
) -> list[Thresholds]:
    """Return the candidates that no other beats in both disagreement and seconds, the safest first.

    The fastest among thousands was also lucky, so stricter versions of the path's first point lead
    up to it: thresholds raised to each grid value in turn.

    search: of the search part. seconds: a function of depths [N, A] and the exits in use; full
    depth without any.

    Returns [] where no candidate is faster than the full model.
    """
    depths = [search.depths(thresholds) for thresholds in candidates]
    risks = [search.replay.differs(ran).mean() for ran in depths]
    times = [seconds(ran, tuple(t)) for ran, t in zip(depths, candidates, strict=True)]
    path: list[Thresholds] = []
    best = seconds(search.depths({}), ())
    for index in np.lexsort((times, risks)):
        if times[index] < best * (1 - STEP):
            path.append(candidates[index])
            best = times[index]
    return [*_stricter(path[0], grid), *path] if path else []


def _stricter(thresholds: Thresholds, grid: Sequence[float]) -> Iterator[Thresholds]:
    """`thresholds` with a floor that falls along the grid, as long as it raises one of them."""
    before = None
    for floor in sorted(grid, reverse=True):
        raised = Thresholds((depth, max(value, floor)) for depth, value in thresholds.items())
        if raised == thresholds:
            return
        if raised != before:
            yield raised
        before = raised
