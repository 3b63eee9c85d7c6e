"""The decoder inside llama.cpp, from files that `offramp export --gguf` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from offramp.runtimes.llama_cpp import EngineOptions, LlamaCppRuntime, export_gguf


def open(
    model: Any, *, gguf: str | Path, context: int = 2048, threads: int = 1, sequences: int = 1
) -> Any:
    """A runtime in the adapter's place; see `LlamaCppRuntime` for what is refused."""
    sizes = EngineOptions(context, threads, sequences=sequences)
    return LlamaCppRuntime(model, gguf, engine=sizes)


def prepare(model: Any, folder: Path, numbers: str) -> None:
    """Write an adapter's files in a number format; see `export_gguf` for what is refused."""
    export_gguf(model, folder, numbers)
