"""Metrics in a form that can be resampled, and intervals for them.

A `Measure` keeps what each example adds to its metric, so that intervals come from resampling
examples and never from scoring again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.core.errors import DataError, InputError

Array = NDArray[np.float64]


def _ratio(sums: Array) -> Array:
    """Sum over count: the value of every metric that is a mean over examples."""
    ratio: Array = sums[..., 0] / sums[..., 1]
    return ratio


@dataclass(frozen=True)
class Measure:
    """A metric over n examples, in a form that can be resampled.

    value: over all the examples. rows: each example's contribution [n, C]; None where the metric is
    no function of sums. of: from sums [..., C] to values [...]. note: for readers of the number,
    such as why it has no interval.
    """

    value: float
    rows: Array | None
    of: Callable[[Array], Array] = _ratio
    note: str = ""


def mean_of(values: Sequence[float] | Array, note: str = "") -> Measure:
    """Return the mean of one value for each example. Raise `DataError` for no values, or a NaN."""
    numbers = finite(values, "values have no mean")
    return Measure(float(numbers.mean()), np.stack([numbers, np.ones_like(numbers)], 1), note=note)


def mean_of_some(values: Sequence[float | None]) -> Measure:
    """Return the mean over the examples with a value; None counts in neither sum nor number."""
    mean = mean_of([value for value in values if value is not None])
    rows = [(0.0, 0.0) if value is None else (value, 1.0) for value in values]
    return Measure(mean.value, np.asarray(rows))


def finite(values: Sequence[float] | Array, problem: str) -> Array:
    """Return the numbers if there is at least one and no NaN. Else raise a `DataError` with
    `problem`, filled with the count."""
    numbers = np.asarray(values, dtype=np.float64)
    if not numbers.size or not np.isfinite(numbers).all():
        raise DataError(
            f"{numbers.size} {problem}: {int((~np.isfinite(numbers)).sum())} are not finite.",
            "Evaluate at least one example, and look for NaN in the model, e.g. from half "
            "precision.",
        )
    return numbers


def interval(
    measure: Measure,
    groups: Sequence[str] | None = None,
    *,
    minus: Measure | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Return the percentile bootstrap interval (Efron and Tibshirani 1993) over examples, or over
    groups.

    groups: a name for each example; examples of one group (the questions about one image) are drawn
    together, because they are not independent. minus: another measure of the same examples; the
    interval is then of the difference, with the same draws for both.

    Returns:
        None where the metric cannot be resampled, or there are fewer than two groups.
    """
    if not 0 < confidence < 1 or resamples < 1:
        raise InputError(
            f"Confidence {confidence} with {resamples} resamples is no interval.",
            "Give a confidence between 0 and 1 and at least one resample.",
        )
    if measure.rows is None or (minus is not None and minus.rows is None):
        return None
    rows = by_group(measure.rows, groups)
    other = None if minus is None or minus.rows is None else by_group(minus.rows, groups)
    if len(rows) < 2:
        return None
    draw = np.random.default_rng(seed)
    parts = []
    for start in range(0, resamples, 50):  # in parts, or 5,000 images would take 40 MB
        count = min(50, resamples - start)
        times = drawn_times(draw, len(rows), count)
        with np.errstate(divide="ignore", invalid="ignore"):
            value = measure.of(times @ rows)
            if minus is not None and other is not None:
                value = value - minus.of(times @ other)
        parts.append(value)
    values = np.concatenate(parts)
    values = values[np.isfinite(values)]  # a draw may hold no example that counts
    if not values.size:
        return None
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def drawn_times(draw: np.random.Generator, groups: int, resamples: int) -> NDArray[np.int64]:
    """Return the number of times that each group is drawn in each resample [R, G]."""
    return draw.multinomial(groups, np.full(groups, 1 / groups), size=resamples)


def by_group(rows: Array, groups: Sequence[str] | None) -> Array:
    """Return each group's contribution [G, C], from each example's [N, C]."""
    if groups is None:
        return rows
    if len(groups) != len(rows):
        raise InputError(
            f"{len(groups)} groups were given for {len(rows)} examples.", "Give one for each."
        )
    _, place = np.unique(np.asarray(groups), return_inverse=True)
    summed = np.zeros((int(place.max()) + 1, rows.shape[1]))
    np.add.at(summed, place, rows)
    return summed
