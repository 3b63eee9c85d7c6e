"""Which of several answers is compared with the full model's: more likely one that exits doubted.

Of each block of answers one is drawn, half of the time as any other and half of the time by how
much exits doubted it. What it loses is divided by its chance, in units of a uniform one (Horvitz
and Thompson 1952). So the mean of what is seen is that of the block, whatever the doubts say: these
change only how soon a larger risk shows. As half of the draws are uniform, no loss counts more than
`MOST` times, and bets on what is seen stay fair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.promises.likeness import mean_log_score

Array = npt.NDArray[Any]

BLOCK = 20
"""Answers of which one is compared. Each waits in memory until its block is full."""
MOST = 2.0
"""How many times a loss counts, at most."""


def doubt(scores: Sequence[float]) -> float:
    """Return how much exits doubted an answer: the negative mean log score of its tokens; NaN
    without scores."""
    mean = mean_log_score(scores)
    return float("nan") if mean is None else -mean


def chances(doubts: Array) -> Array:
    """Return the chance [..., n] of each answer of a block to be drawn for comparison.

    doubts: of the answers, at least 0 [..., n]; NaN: unknown, which counts as the mean of the
    others.
    """
    n = doubts.shape[-1]
    known = np.isfinite(doubts)
    sums = np.where(known, doubts, 0.0).sum(-1, keepdims=True)
    usual = sums / np.maximum(1, known.sum(-1, keepdims=True))
    values = np.where(known, doubts, usual)
    total = values.sum(-1, keepdims=True)
    shares = np.where(total > 0, values / np.where(total > 0, total, 1.0), 1 / n)
    return np.asarray((1 / n + shares) / 2)
