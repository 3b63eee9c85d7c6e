"""Rows of the vLLM plug-in: who leaves, which slots wait, and what a ragged call holds."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch

from offramp.core.decoding.scores import SCORES as OURS
from offramp_vllm.rows import Ragged, first_waiting, leaves, put_off, rounds, slots_of, verified
from offramp_vllm.scores import SCORES

BLOCK = 4


def test_scores_are_offramps_own() -> None:
    logits = 3 * torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    logits[0, 1:] = float("-inf")
    for name, score in SCORES.items():
        torch.testing.assert_close(score(logits), OURS[name](logits), rtol=0, atol=0)


def test_a_token_leaves_at_its_threshold_at_zero_always_and_at_nan_never() -> None:
    nan = float("nan")
    scores = torch.tensor([0.5, 0.4999, nan, 1.0])
    thresholds = torch.tensor([0.5, 0.5, 0.0, nan])
    assert leaves(scores, thresholds).tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("deeper", "again", "off"),
    [
        ([1, 0, 0, 0], [0, 0, 0, 0], True),
        ([1, 1, 0, 0], [0, 0, 0, 0], False),  # enough of them
        ([1, 0, 0, 0], [2, 0, 0, 0], False),  # long enough
        ([0, 1, 0, 0], [0, -1, 0, 0], False),  # at full depth, say
        ([0, 1, 0, 0], [-1, 1, -1, -1], True),
    ],
)
def test_few_tokens_that_go_deeper_are_put_off_but_not_for_long(
    deeper: list[int], again: list[int], off: bool
) -> None:
    asks = np.ones(4, dtype=bool)
    assert put_off(np.array(deeper, dtype=bool), asks, np.array(again)) is off


@pytest.mark.parametrize("seed", range(5))
def test_the_first_waiting_place_is_what_a_loop_finds(seed: int) -> None:
    draw = np.random.default_rng(seed)
    level = draw.integers(0, 3, 10 * BLOCK).astype(np.uint8)
    table = np.stack([draw.permutation(10)[:5] for _ in range(6)]).astype(np.int32)
    lengths = draw.integers(1, 5 * BLOCK + 1, 6)
    for below in (1, 2):
        found = first_waiting(level, table, lengths, BLOCK, below)
        for row in range(6):
            length = int(lengths[row])
            places = [
                place
                for place in range(length)
                if level[int(table[row, place // BLOCK]) * BLOCK + place % BLOCK] < below
            ]
            assert int(found[row]) == (places[0] if places else length)


def test_slots_are_the_blocks_of_the_table() -> None:
    table = np.array([[7, 2], [0, 5]])
    slots = slots_of(table, np.array([0, 0, 1]), np.array([1, 4, 7]), BLOCK)
    assert slots.tolist() == [29, 8, 23]


def call(*parts: tuple[int, int, int]) -> Ragged:
    return Ragged(*(np.array(column) for column in zip(*parts, strict=True)))


def test_tokens_of_a_ragged_call_stand_request_after_request() -> None:
    rows, places = call((3, 5, 7), (0, 0, 3)).tokens()
    assert rows.tolist() == [3, 3, 0, 0, 0] and places.tolist() == [5, 6, 0, 1, 2]
    assert call((3, 5, 7), (0, 0, 3)).offsets.tolist() == [0, 2, 5]


@pytest.mark.parametrize("most", range(1, 12))
def test_rounds_hold_every_token_once_in_order_and_no_more_than_they_may(most: int) -> None:
    whole = call((3, 5, 7), (0, 0, 3), (4, 2, 8))
    parts = list(rounds(whole, most))

    def pairs(one: Ragged) -> list[tuple[int, int]]:
        rows, places = one.tokens()
        return [*zip(rows.tolist(), places.tolist(), strict=True)]

    assert [pair for part in parts for pair in pairs(part)] == pairs(whole)
    assert all(1 <= int(part.offsets[-1]) <= most for part in parts)
    assert all(int(part.offsets[-1]) == most for part in parts[:-1])


def test_greedy_drafts_are_kept_up_to_the_first_that_the_model_does_not_say() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        counts = torch.randint(0, 5, (6,), generator=generator)
        says, drafts = (
            [torch.randint(0, 2, (n + more,), generator=generator).tolist() for n in counts]
            for more in (1, 0)
        )
        said, proposed = (
            torch.tensor([*chain(*rows)], dtype=torch.long) for rows in (says, drafts)
        )
        found = verified(said, proposed, counts)
        for own, drafted, row in zip(says, drafts, found.tolist(), strict=True):
            same = [a == b for a, b in zip(own, drafted, strict=False)]
            kept = same.index(False) if False in same else len(drafted)
            assert row == [*own[: kept + 1], *[-1] * (len(row) - kept - 1)]
