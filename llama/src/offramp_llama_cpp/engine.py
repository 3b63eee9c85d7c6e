"""The engine "llama.cpp": the decoder in GGUF files that `offramp export --gguf` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from offramp.core.errors import AdapterError, InputError
from offramp.engines import register_engine
from offramp_llama_cpp.gguf_writing import FORMATS

SLOTS = 4
"""Answers at the same time, each with a context of its own."""


def open(
    model: Any, *, gguf: str | Path, context: int = 2048, threads: int = 1, sequences: int = 1
) -> Any:
    """Return a runtime in the adapter's place; see `LlamaCppRuntime` for what is refused."""
    from offramp_llama_cpp import EngineOptions, LlamaCppRuntime

    sizes = EngineOptions(context, threads, sequences=sequences)
    return LlamaCppRuntime(model, gguf, engine=sizes)


def prepare(model: Any, folder: Path, numbers: str) -> None:
    """Write an adapter's files in a number format; see `export_gguf` for what is refused."""
    from offramp_llama_cpp import export_gguf

    export_gguf(model, folder, numbers)


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds all that `prepare` writes, byte for byte."""
    from offramp_llama_cpp.gguf_files import read_segments

    try:
        read_segments(folder)
    except AdapterError:
        return False
    return True


def seeing(adapter: Any, folder: Any, threads: int) -> Any:
    """Return the adapter on a backbone that sees by the projector's file in a folder."""
    from offramp_llama_cpp import with_mtmd

    return with_mtmd(adapter, folder, threads=threads)


def kernels_here() -> str:
    """Return which kernels multiply on this processor, or why there are none; compiles nothing."""
    from offramp_llama_cpp import kernels
    from offramp_llama_cpp.native.compiling import reason_not_compiled

    if why := reason_not_compiled("products"):
        return f"own kernels: {why}"
    try:
        return f"multiplies by {kernels()}"
    except InputError as error:
        return str(error).splitlines()[0]


def as_in_file(backbone: Any, numbers: str) -> Any:
    """Return the backbone with weights as files of a number format hold them."""
    from offramp_llama_cpp import Dequantised

    return Dequantised(backbone, numbers)


register_engine(
    "llama.cpp",
    open,
    "needs --gguf",
    replaces=True,
    reads_files=True,
    prepare=prepare,
    is_prepared=is_prepared,
    together=SLOTS,
    towers={"mtmd": seeing},
    said_here=kernels_here,
    formats=FORMATS,
    as_in_file=as_in_file,
)
