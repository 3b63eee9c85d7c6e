"""Times on a GPU, by two clocks: laws of what is calculated."""

from __future__ import annotations

from itertools import pairwise

import pytest

from offramp_lab.records import gpu

CARD, HOST = gpu.CARDS["H100 SXM"], {False: 1e-3, True: 4e-4}
COUNTS = gpu.Counts(layer=46, full=9, exit=10, waits=1)
SHAPE = gpu.SHAPES["Qwen2.5-7B"]


def took(way: str, share: float = 0.0, depth: int = 7, card: float = CARD) -> float:
    return gpu.seconds(gpu.steps(SHAPE, card, depth, COUNTS, HOST)[way], share)


def test_no_way_is_faster_than_memory_is_read() -> None:
    for way in gpu.steps(SHAPE, CARD, 7, COUNTS, HOST):
        layers = 8 if "exit" in way else 28
        wide, inner, keys = SHAPE.wide, SHAPE.inner, SHAPE.keys
        weights = layers * wide * (2 * wide + 2 * keys + 3 * inner)
        assert took(way) > 2 * weights / CARD


@pytest.mark.parametrize("way", ["PyTorch, early exit", "vLLM, early exit", gpu.BEST])
def test_a_token_takes_longer_the_more_go_deeper_and_the_higher_the_exit(way: str) -> None:
    for few, many in pairwise((0.0, 0.1, 0.2, 1.0)):
        assert took(way, few) < took(way, many)
    for low, high in pairwise((3, 7, 14, 27)):
        assert took(way, depth=low) < took(way, depth=high)


def test_a_host_that_is_slower_than_the_device_decides() -> None:
    launches = 28 * COUNTS.layer + COUNTS.full
    assert took("PyTorch, full depth", card=1e18) == pytest.approx(
        launches * gpu.LAUNCH + gpu.WAIT + gpu.KERNEL, rel=0.01
    )


def test_where_every_token_goes_deeper_exits_cost_time() -> None:
    assert took("vLLM, early exit", 1.0) > took(gpu.FULL)
