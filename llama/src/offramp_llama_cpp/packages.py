"""The packages of the extra `llama-cpp`, imported when they are first needed."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

from offramp.core.errors import InputError
from offramp.core.missing import how_to_install


def import_gguf() -> Any:
    """The package that reads and writes GGUF files. Raise `InputError` where it is missing."""
    log = logging.getLogger("gguf")
    if log.level == logging.NOTSET:  # it would name every file that is staged
        log.setLevel(logging.WARNING)
    return _import("gguf")


def import_llama_cpp() -> Any:
    """The bindings of llama.cpp. Raise `InputError` where they are missing or do not load."""
    return _import("llama_cpp")


def headers() -> Path:
    """The folder of llama.cpp's header files. Raise `InputError` where the bindings are missing."""
    return Path(import_llama_cpp().__file__).parents[1] / "include"


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:  # the last two: its library does not load
        raise InputError(
            f"The llama.cpp runtime needs the package {name}: {error}.",
            how_to_install("llama-cpp-python"),
        ) from error
