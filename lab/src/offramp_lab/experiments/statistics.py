"""Intervals that the lab alone asks for: of shares and means by image, and of what was picked after
looking."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offramp.evaluation.statistics import Array, Measure, drawn_times, interval


@dataclass(frozen=True)
class Bootstrap:
    """How intervals of shares and means are drawn: over `groups`, the image of each example.

    confidence, resamples, seed: as of `interval`.
    """

    groups: Sequence[str]
    confidence: float = 0.95
    resamples: int = 1000
    seed: int = 0

    def estimate(self, sums: Array, minus: Array | None = None) -> dict[str, Any]:
        """`value`, `low` and `high` of a ratio of sums [N, 2], or of the difference of two.

        All None where nothing is counted; low and high None where nothing can be resampled.
        """
        parts = [sums] if minus is None else [sums, minus]
        if any(part[:, 1].sum() == 0 for part in parts):
            return {"value": None, "low": None, "high": None}
        measures = [
            Measure(float(p[:, 0].sum() / p[:, 1].sum()), p.astype(np.float64)) for p in parts
        ]
        ends = interval(
            measures[0],
            self.groups,
            minus=measures[1] if minus is not None else None,
            confidence=self.confidence,
            resamples=self.resamples,
            seed=self.seed,
        )
        value = measures[0].value - (measures[1].value if minus is not None else 0.0)
        low, high = ends or (None, None)
        return {"value": value, "low": low, "high": high}

    def mean(self, values: Array, minus: Array | None = None) -> dict[str, Any]:
        """The same of a mean over examples [N], or of the difference of two."""
        ones = np.ones(len(values))
        return self.estimate(
            np.stack([values, ones], 1), None if minus is None else np.stack([minus, ones], 1)
        )

    def within(self, chosen: Array) -> Bootstrap:
        """The same for some of the examples, `chosen` [N]."""
        groups = [g for g, yes in zip(self.groups, chosen, strict=True) if yes]
        return Bootstrap(groups, self.confidence, self.resamples, self.seed)

    def simultaneous(
        self, rows: Array, of: Callable[[Array], Array], picked: int
    ) -> tuple[float, float] | None:
        """The interval of one of K values that was picked after looking at all: max-t.

        value -+ q * deviation, where q is the quantile over draws of the largest studentised error
        of any of the K (Romano and Wolf 2005).

        Args:
            rows: what each group adds [G, C]. of: from sums [..., C] to values [..., K].
            picked: which of the K.

        Returns:
            None where there is a single group.
        """
        if len(rows) < 2:
            return None
        value = of(rows.sum(0))
        draw = np.random.default_rng(self.seed)
        errors = of(drawn_times(draw, len(rows), self.resamples) @ rows) - value
        deviation = errors.std(0)
        varies = deviation > 0
        largest = (np.abs(errors[:, varies]) / deviation[varies]).max(1)
        reach = float(np.quantile(largest, self.confidence) * deviation[picked])
        return float(value[picked]) - reach, float(value[picked]) + reach
