"""Intervals of the lab's own."""

from __future__ import annotations

import pytest

from offramp_lab.experiments.statistics import t_interval


def test_the_t_interval_of_a_few_values_is_the_textbooks() -> None:
    low, high = t_interval([1.0, 2.0, 3.0])  # t of 2 degrees is 4.303, the deviation 1
    assert (low, high) == (pytest.approx(2 - 2.4841, abs=1e-4), pytest.approx(2 + 2.4841, abs=1e-4))
    assert t_interval([1.0]) == (None, None)
