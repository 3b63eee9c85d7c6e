"""The norm by a kernel of our own: by root mean square, as it is defined."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from offramp_llama_cpp.native import products
from offramp_llama_cpp.native.tap import States

pytestmark = [pytest.mark.llama_cpp, pytest.mark.usefixtures("instructions")]


def normed(x: States, epsilon: float) -> States:
    out = np.full(len(x) + 1, 7.0, dtype=np.float32)
    products._native().offramp_norm(
        x.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_size_t(len(x)),
        ctypes.c_float(epsilon),
        out.ctypes.data_as(ctypes.c_void_p),
    )
    assert out[-1] == 7.0
    return out[:-1]


@pytest.mark.parametrize("width", [16, 64, 96, 576, 4096])
@pytest.mark.parametrize(
    ("scale", "epsilon"),
    [(1.0, 1e-5), (1e-4, 1e-6), (300.0, 1e-6), (1e18, 1e-6), (1e25, 1e-6), (1e37, 1e-6)],
)
def test_it_is_what_the_norm_is_defined_as(width: int, scale: float, epsilon: float) -> None:
    x = np.random.default_rng(width).normal(size=width).astype(np.float32) * np.float32(scale)
    exact = x.astype(np.float64)
    exact /= np.sqrt(np.square(exact).mean() + epsilon)
    np.testing.assert_allclose(normed(x, epsilon), exact, rtol=1e-6, atol=1e-9)


def test_nothing_stays_nothing_and_what_is_no_number_none() -> None:
    assert not normed(np.zeros(64, dtype=np.float32), 1e-6).any()
    x = np.ones(64, dtype=np.float32)
    x[3] = np.nan
    assert np.isnan(normed(x, 1e-6)).all()
