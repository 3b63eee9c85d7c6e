"""The interval that the lab alone asks for: of a few seeds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev


def t_interval(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """Student's 95% interval of the mean of a few values, such as seeds'; (None, None) for a single
    one."""
    from scipy.stats import t as student

    if len(values) < 2:
        return None, None
    tail = float(student.ppf(0.975, len(values) - 1))
    half, middle = tail * stdev(values) / len(values) ** 0.5, mean(values)
    return middle - half, middle + half
