"""Exports of the tiny adapters, written once; the kernels, compiled for each kind of processor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from gguf_cases import EXACT, adapter_of, drafting

from offramp_llama_cpp import LlamaCppRuntime, export_gguf, kernels
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


@pytest.fixture(scope="session")
def drafting_runtime(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., LlamaCppRuntime]]:
    """`drafting_runtime(name, formats, sequences, compiled)`: of exits that draft on, loaded once.
    compiled: whether C asks for drafts and reads taps."""
    made: list[LlamaCppRuntime] = []

    @cache
    def load(
        name: str, formats: str = "f32", sequences: int = 1, compiled: bool = True
    ) -> LlamaCppRuntime:
        adapter = drafting(adapter_of(name))
        folder = tmp_path_factory.mktemp("drafting")
        export_gguf(adapter, folder, formats)
        engine = replace(EXACT, sequences=sequences, compiled_tap=compiled)
        made.append(LlamaCppRuntime(adapter, folder, engine=engine))
        return made[-1]

    yield load
    for runtime in made:
        runtime.close()


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
