"""Exports of the tiny adapters, written once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from gguf_cases import adapter_of

from offramp.runtimes.llama_cpp import export_gguf


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`exported(name, formats)`: the folder of an export. Shared: never change it."""

    @cache
    def write(name: str, formats: str = "f32") -> Path:
        folder = tmp_path_factory.mktemp("gguf")
        export_gguf(adapter_of(name), folder, formats)
        return folder

    return write
