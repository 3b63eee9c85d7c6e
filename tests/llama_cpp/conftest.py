"""Exports of the tiny adapters, written once; the kernels, compiled for each kind of processor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from gguf_cases import adapter_of

from offramp_llama_cpp import export_gguf, kernels
from offramp_llama_cpp.gguf_export import ExportFormats
from offramp_llama_cpp.native import compiling, products, recipe
from offramp_llama_cpp.segment import library


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`exported(name, formats)`: the folder of an export. Shared: never change it."""

    @cache
    def write(name: str, formats: ExportFormats | str = "f32") -> Path:
        folder = tmp_path_factory.mktemp("gguf")
        export_gguf(adapter_of(name), folder, formats)
        return folder

    return write


@pytest.fixture
def run_here() -> None:
    if products.reason_against(library()._lib):
        pytest.skip("the kernels do not run here")


@pytest.fixture
def anew() -> Iterator[Callable[[], None]]:
    """`anew()`: what was compiled is forgotten, as it is before and after the test."""

    def forget() -> None:
        compiling.compiled.cache_clear()
        products._native.cache_clear()

    forget()
    yield forget
    forget()


@pytest.fixture(params=["AVX-512", "AVX2"])
def instructions(request: pytest.FixtureRequest, anew: Any, monkeypatch: Any) -> None:
    """Kernels that were compiled for these alone."""
    flags = {"AVX-512": recipe.AVX512, "AVX2": recipe.AVX2}[request.param]
    monkeypatch.setattr(products, "INSTRUCTIONS", (flags,))
    if products._native() is None:
        pytest.skip("the kernels do not run here")
    assert kernels() == f"kernels of offramp for {request.param}"
