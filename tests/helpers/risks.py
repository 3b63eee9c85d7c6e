"""Losses whose true risk is known, to hold calibration against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from offramp.calibration.replay import PolicyReplay, Replay
from offramp.core.decoding.policy import ExitPolicy

TARGET, CONFIDENCE, N = 0.05, 0.9, 300
LAYERS, DEPTHS, COARSE = 6, (2, 4), (0.95, 0.85, 0.7, 0.5)
Draw = np.random.Generator

LOST: dict[str, list[float]] = {
    "monotone": [0, 0.01, 0.03, 0.06, 0.08, 0.2],
    "dip": [0.03, 0.08, 0.03, 0.2, 0.01, 0],
    "dip into the target": [0.051, 0.04, 0.06, 0.04, 0.055, 0.03],
    "gains": [0.01, 0.04, 0.07, 0.09, 0.12, 0.2],
}
GAINED = {"gains": [0, 0.02, 0.03, 0.035, 0.06, 0.08]}


def drawn(draw: Draw, shape: str, n: int = N) -> Any:
    """Losses [n, K] of a shape: 1, -1 for a gain, or 0; paired, as answers to one example are."""
    u = draw.random((n, 1))
    lost, gained = np.array(LOST[shape]), np.array(GAINED.get(shape, [0.0] * 6))
    return (u < lost) * 1.0 - (u > 1 - gained)


def truth(shape: str) -> Any:
    return np.array(LOST[shape]) - np.array(GAINED.get(shape, [0.0] * 6))


def allowed(share: float, trials: int) -> float:
    """A share and three standard errors above it."""
    return share + 3 * math.sqrt(share * (1 - share) / trials)


def at_target(draw: Draw, kind: str) -> Any:
    """Losses [200] whose true mean is 0.1."""
    u = draw.random(200)
    return {
        "0 or 1": (u < 0.1) * 1.0,
        "fractions": 0.5 * (u < 0.2),
        "gains": (u < 0.2) * 1.0 - (u > 0.9),
    }[kind]


@cache
def population(n: int = 20_000, length: int = 4) -> PolicyReplay:
    """Answers of a model whose exits are wrong more often where they are less sure."""
    draw = np.random.default_rng(0)
    right = np.zeros((n, length), dtype=int)
    hard = draw.random((n, length))
    scores, said = {}, {}
    for depth, steep in zip(DEPTHS, (0.9, 0.5), strict=True):
        sure = np.clip(1 - steep * hard + 0.05 * draw.normal(size=hard.shape), 0, 1)
        wrong = draw.random(hard.shape) < 0.3 * (1 - sure) ** 2
        scores[depth], said[depth] = sure, wrong.astype(int)
    return PolicyReplay(Replay(LAYERS, right, right, said, scores), ExitPolicy(), first=True)


def seconds(depths: Any, exits: Sequence[int]) -> float:
    """Layers run, and half a layer for each look."""
    looks = sum((depths >= depth).sum() for depth in exits)
    return float(depths.sum() + 0.5 * looks)
