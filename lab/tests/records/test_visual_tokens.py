"""What is predicted of a prompt with many visual tokens is the sum of what runs."""

from __future__ import annotations

import pytest

from offramp_lab.records.visual_tokens import ALL, TOKENS, Parts, Way, predicted, ways

WHOLE = Parts(prompt=100.0, token=10.0, head=1.0, before=5.0, beside=0.5)
KEPT = Parts(prompt=30.0, token=4.0, head=1.0, before=5.0, beside=0.5)
LAYERS, SHARE = 8, 0.25


@pytest.mark.parametrize(
    ("way", "first", "token"),
    [
        (Way(), 5 + 8 * 100 + 1, 0.5 + 8 * 10 + 1),
        (Way(2, "none"), 5 + 2 * 100 + 100 + 1, 0.5 + 3 * 10 + 1),
        (Way(2, "first"), 5 + 2 * 100 + 0.25 * 100 + 6 * 100 + 1, 0.5 + 3 * 10 + 1),
        (Way(2, "first", 0.5), 5 + 2 * 100 + 100 + 6 * 30 + 1, 0.5 + 3 * 10 + 1),
        (Way(2, "all", 0.5), 5 + 2 * 100 + 100 + 6 * 30 + 1, 0.5 + 3 * 10 + 6 * 4 + 2),
        (Way(2, "none", 0.5, "divprune"), 5 + 3 * 30 + 1, 0.5 + 3 * 4 + 1),
        (Way(2, "first", 0.5, "divprune"), 5 + 8 * 30 + 0.25 * 30 + 1, 0.5 + 3 * 4 + 1),
    ],
    ids=str,
)
def test_a_way_takes_what_its_layers_its_exit_and_its_head_take(
    way: Way, first: float, token: float
) -> None:
    made = predicted(way, LAYERS, WHOLE, WHOLE if way.keep == 1 else KEPT, SHARE)
    assert made.first == pytest.approx(first)
    assert made.whole == pytest.approx(first + (TOKENS - 1) * token)


def test_ways_are_distinct_and_begin_with_the_full_model() -> None:
    assert ways()[0] == Way() and len(set(ways())) == len(ways())
    for way in ways()[1:]:
        pruning = way.policy.pruning
        assert (pruning is None) == (way.keep == 1)
        assert pruning is None or pruning.depth == (way.depth if way.ranking == ALL else 0)
