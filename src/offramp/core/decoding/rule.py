"""When a token exits: the one place that decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np

VERIFIED = float("inf")
"""A product of probabilities that no drafts reach: the full model verifies them all."""


class ExitVerdict(NamedTuple):
    """An exit's prediction of a sequence's next token. score: in [0, 1]; NaN: not computed."""

    token: int
    score: float


@dataclass(frozen=True)
class ExitRule:
    """The thresholds and mode by which one request uses the exits.

    thresholds: by depth; a token exits at the first depth where score >= threshold. For a drafter:
    the lowest score at which it drafts on.
    first: thresholds of an answer's first token; None: as every token.
    trust: None: tokens exit. Else exits only draft: drafts that end the answer are taken if the
    product of their probabilities is at least `trust`, and the full model verifies all others.
    max_drafts: drafted tokens in a round, at most.
    """

    thresholds: Mapping[int, float]
    first: Mapping[int, float] | None = None
    trust: float | None = None
    max_drafts: int = 8

    @cached_property
    def opening(self) -> ExitRule:
        """The rule for an answer's first token."""
        first = self.thresholds if self.first is None else self.first
        return replace(self, thresholds=first, first=None)

    @cached_property
    def single(self) -> Mapping[int, float]:
        """The thresholds rounded to float32, the precision of scores."""
        return {depth: _single(threshold) for depth, threshold in self.thresholds.items()}

    @property
    def uses_exits(self) -> bool:
        return bool(self.thresholds)

    @cached_property
    def exiting(self) -> bool:
        """Return True if tokens exit by thresholds."""
        return bool(self.thresholds) and self.trust is None

    @cached_property
    def drafts(self) -> bool:
        """Return True if tokens are drafted."""
        return bool(self.thresholds) and self.trust is not None

    @property
    def early(self) -> bool:
        """Return True if tokens may be other than the full model's."""
        return self.exiting or self.takes(1.0)

    def takes(self, product: float) -> bool:
        """Return True if drafts with this product of probabilities may end the answer
        unverified."""
        return self.trust is not None and product >= self.trust

    def scored(self, depth: int) -> bool:
        """Return True if the score at `depth` is read: at a threshold of 0 only for products."""
        return self.thresholds.get(depth) != 0.0 or self.trust not in (None, VERIFIED)

    def exits(self, depth: int, verdict: ExitVerdict) -> bool:
        """Return True if a token exits, or is drafted, at `depth`; verdict: of the exit there."""
        return bool(self.reaches(depth, verdict.score))

    def reaches(self, depth: int, score: Any) -> Any:
        """Return True if a score, or each of an array of them, is enough at `depth`. At a threshold
        of 0 every token exits, and its score is NaN."""
        threshold = self.single.get(depth)
        if threshold is None:
            return False
        return threshold == 0.0 or score >= threshold


NO_EXITS = ExitRule({})
"""Every token is the full model's."""


@cache
def _single(threshold: float) -> float:
    return float(np.float32(threshold))
