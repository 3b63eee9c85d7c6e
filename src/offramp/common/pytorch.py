"""A check for PyTorch, and the error where it is missing."""

from __future__ import annotations

import importlib.util
import sys

from offramp.core.errors import InputError
from offramp.core.missing import EDGE, install_command, installed


def has_pytorch() -> bool:
    """Return True if PyTorch is installed, without importing it."""
    if "torch" in sys.modules:
        return sys.modules["torch"] is not None
    return importlib.util.find_spec("torch") is not None


def needs_pytorch(what: str) -> InputError:
    """Return the error for a feature that needs PyTorch, which is not installed. what: the
    feature."""
    apart = ", in an environment of its own" if installed()[0] == EDGE else ""
    return InputError(
        f"{what} needs PyTorch, which is not installed.",
        "Without it `offramp generate` and `offramp serve` take a GGUF file that "
        "`offramp export` cut. "
        f"For the rest{apart}: {install_command('')}",
    )
