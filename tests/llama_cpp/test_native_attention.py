"""Attention by kernels of our own: as it is defined, and of each token as if it came alone."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from offramp_llama_cpp import segment
from offramp_llama_cpp.native import products
from offramp_llama_cpp.segment import EngineOptions, Part, Segment

pytestmark = [pytest.mark.llama_cpp, pytest.mark.usefixtures("instructions")]

Array = npt.NDArray[Any]
SIZES = ("tokens", "heads", "shared", "cells", "width_k", "width_v")


class _Attention(ctypes.Structure):
    """As attention.h has it."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in SIZES),
        ("q", ctypes.c_void_p),
        *((name, ctypes.c_size_t) for name in ("q_token", "q_head")),
        *((name, ctypes.c_void_p) for name in ("k", "v")),
        *((name, ctypes.c_size_t) for name in ("k_cell", "k_head", "v_cell", "v_head")),
        ("mask", ctypes.c_void_p),
        ("mask_token", ctypes.c_size_t),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_size_t) for name in ("out_token", "out_head")),
        ("scale", ctypes.c_float),
    )


def aligned(array: Array) -> Array:
    """A copy that vectors can be loaded from."""
    room = np.empty(array.nbytes + 64, dtype=np.uint8)
    start = -room.ctypes.data % 64
    made = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    made[:] = array
    return made


@dataclass
class Case:
    """q: [T, H, K]. k, v: [C, G, K] and [C, G, V], halves. mask: [T, C], halves."""

    q: Array
    k: Array
    v: Array
    mask: Array

    @classmethod
    def drawn(
        cls, tokens: int, heads: int, shared: int, cells: int, widths: tuple[int, int]
    ) -> Case:
        draw = np.random.default_rng(0)
        wide_k, wide_v = widths
        mask = np.where(draw.random((tokens, cells)) < 0.7, 0.0, -np.inf)
        mask[:, 0] = -1.5  # what is added need not be 0
        return cls(
            draw.normal(size=(tokens, heads, wide_k)).astype(np.float32) * 3,
            aligned(draw.normal(size=(cells, heads // shared, wide_k)).astype(np.float16)),
            aligned(draw.normal(size=(cells, heads // shared, wide_v)).astype(np.float16)),
            mask.astype(np.float16),
        )

    def run(self) -> Array:
        """By the kernel: [T, H, V]."""
        (tokens, heads, width), (cells, groups, wide) = self.q.shape, self.v.shape
        q, mask = np.ascontiguousarray(self.q), np.ascontiguousarray(self.mask)
        out = np.full((tokens, heads, wide), 7.0, dtype=np.float32)
        attention = _Attention(
            tokens,
            heads,
            heads // groups,
            cells,
            width,
            wide,
            q.ctypes.data,
            heads * width,
            width,
            self.k.ctypes.data,
            self.v.ctypes.data,
            *self.k.strides[:2],
            *self.v.strides[:2],
            mask.ctypes.data,
            cells,
            out.ctypes.data,
            heads * wide,
            wide,
            width**-0.5,
        )
        products._native().offramp_attention(ctypes.byref(attention))
        return out

    def defined(self) -> Array:
        """In float64."""
        shared = self.q.shape[1] // self.k.shape[1]
        k, v = (np.repeat(x.astype(np.float64), shared, 1) for x in (self.k, self.v))
        logits = np.einsum("thd,chd->htc", self.q, k) * self.q.shape[2] ** -0.5 + self.mask
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return np.einsum("htc,chd->thd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("widths", [(64, 64), (128, 128), (16, 16), (80, 80), (192, 128)])
@pytest.mark.parametrize(
    ("heads", "shared"), [(4, 1), (9, 3), (10, 5), (12, 6), (14, 7), (8, 8), (18, 9)]
)
@pytest.mark.parametrize("cells", [1, 63, 64, 200])
def test_it_is_what_attention_is_defined_as(
    widths: tuple[int, int], heads: int, shared: int, cells: int
) -> None:
    case = Case.drawn(3, heads, shared, cells, widths)
    assert np.abs(case.run() - case.defined()).max() < 5e-6


def test_a_token_gets_the_same_bits_in_any_company() -> None:
    case = Case.drawn(9, 9, 3, 150, (64, 64))
    together = case.run()
    for token in range(9):
        q, mask = case.q[token : token + 1], case.mask[token : token + 1]
        assert np.array_equal(Case(q, case.k, case.v, mask).run()[0], together[token])


def test_cells_that_nobody_sees_change_nothing() -> None:
    """A cache's room grows, and stands where others were."""
    case = Case.drawn(2, 4, 2, 64, (64, 64))
    longer = [aligned(np.concatenate([x, np.full_like(x, np.nan)])) for x in (case.k, case.v)]
    unseen = np.full_like(case.mask, -np.inf)
    mask = np.concatenate([case.mask, unseen], 1)
    assert np.array_equal(Case(case.q, *longer, mask).run(), case.run())


def test_logits_far_apart_leave_the_largest() -> None:
    case = Case.drawn(2, 4, 1, 70, (64, 64))
    case.q *= 1000
    assert np.abs(case.run() - case.defined()).max() < 2e-6


def test_what_is_no_number_stays_none_and_who_sees_nothing_gets_nothing() -> None:
    case = Case.drawn(3, 4, 1, 70, (64, 64))
    case.q[1, 2] = np.nan
    case.mask[2] = -np.inf
    found = case.run()
    assert np.isnan(found[1, 2]).all() and not np.isnan(found[[0, 1], [0, 3]]).any()
    assert not found[2].any()


def test_llama_cpps_own_is_replaced_where_heads_are_whole_vectors(
    exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By nearly the same numbers, as values are summed in float32. The LLaVA's heads are 8 wide."""
    tap, made = segment.Tap, {}

    def elsewhere(library: Any, tensor: str, *sizes: int, **options: Any) -> Any:
        return tap(library, tensor and "kqv_out-0", *sizes, **options)

    monkeypatch.setattr(segment, "Tap", elsewhere)
    states = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
    for ours in (True, False):
        options = EngineOptions(context=256, kernels=ours)
        by = Segment(exported("llava", "f32") / "segment-0.gguf", options, tap_layer=1)
        assert by.tap is not None
        by.feed(states, 1)
        made[ours] = by.tap.rows().copy()
        by.close()
    away = np.abs(made[True] - made[False]).max()
    assert away < 1e-2 * np.abs(made[True]).max()
    assert bool(away) == (products.instructions() == "AVX2")


def test_sequences_that_share_a_call_get_what_each_gets_alone(
    exported: Callable[..., Path],
) -> None:
    """Each has cells of its own, and what it sees there."""
    draw = np.random.default_rng(0)
    first, then = (draw.normal(size=(2, 3, 32)).astype(np.float32) for _ in range(2))
    options = EngineOptions(context=256, sequences=2)
    by = Segment(exported("llava", "f32") / "segment-0.gguf", options, tap_layer=1)
    assert by.tap is not None
    alone = []
    for slot in (0, 1):
        by.feed(first[slot], 1, slot=slot)
        by.feed(then[slot], 1, slot=slot)
        alone.append(by.tap.rows().copy())
        by.crop(3, slot)
    by.feed_together([Part(slot, then[slot], 1, 0) for slot in (0, 1)])
    assert np.array_equal(by.tap.rows(), np.concatenate(alone))
    by.close()
