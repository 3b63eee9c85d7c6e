"""Which modules are built alike, so that one piece of code serves them all; and all their code."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from offramp.engine.executors.modules.code import CannotCompileError, Code

log = logging.getLogger(__name__)

_COMMON = frozenset(nn.Module().__dict__) | {"layer_idx"}


class Kind:
    """Modules that are built alike. codes: by kind of call; None where there is none."""

    def __init__(self, parts: list[Any], weights: list[Any]) -> None:
        self.parts, self.weights = parts, weights
        self.codes: dict[Any, Code | None] = {}


class Codes:
    """All code of one backbone and of the exits on it."""

    def __init__(self) -> None:
        self._kinds: list[Kind] = []
        self._of: WeakKeyDictionary[nn.Module, tuple[Kind, set[Any]]] = WeakKeyDictionary()
        self._lock = threading.RLock()
        self._warned = False

    def known(self, module: nn.Module) -> tuple[Kind, set[Any]]:
        """The kind of a module, and the kinds of call in which its code was found right."""
        weights = _layout(module)
        with self._lock:
            known = self._of.get(module)
            if known is None or known[0].weights != weights:  # they may have been converted
                parts = _parts(module)
                alike = (k for k in self._kinds if k.weights == weights and _equal(k.parts, parts))
                kind = next(alike, None)
                if kind is None:
                    kind = Kind(parts, weights)
                    self._kinds.append(kind)
                known = self._of[module] = kind, set()
            return known

    def make(self, kind: Kind, key: Any, name: str, compile_it: Callable[[], Code]) -> Code | None:
        """The code for this kind of call; None, and a warning, where there is none."""
        with self._lock:
            if key not in kind.codes:
                start = time.perf_counter()
                log.info("Compiling %s, for calls with %d at once.", name, key[0])
                try:
                    kind.codes[key] = compile_it()
                    log.info("Compiled in %.1f s.", time.perf_counter() - start)
                except CannotCompileError as error:
                    kind.codes[key] = None
                    self.warn(f"{name}: {error}")
            return kind.codes[key]

    def warn(self, reason: str) -> None:
        """Say once that something runs as before."""
        if not self._warned:
            log.warning("Decoding is not all compiled, and runs as without: %s", reason)
        self._warned = True


def tensors_of(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Parameters and buffers, with the part that each belongs to."""
    parts = (part for _, part in module.named_modules(remove_duplicate=False))
    return [
        (part, name, tensor)
        for part in parts
        for table in (part._parameters, part._buffers)
        for name, tensor in table.items()
        if tensor is not None
    ]


def _parts(module: nn.Module) -> list[Any]:
    """What makes the code of a module, beside its weights."""
    return [
        (name, type(part), {n: _open(v) for n, v in part.__dict__.items() if n not in _COMMON})
        for name, part in module.named_modules(remove_duplicate=False)
    ]


def _layout(module: nn.Module) -> list[Any]:
    """How the weights of a module lie."""
    return [
        (name, t.shape, t.stride() if t.layout == torch.strided else t.layout, t.dtype, t.device)
        for _, name, t in tensors_of(module)
    ]


def _open(value: Any) -> Any:
    """What can be compared, as a partial function cannot."""
    return (value.func, value.args, value.keywords) if isinstance(value, partial) else value


def _equal(one: list[Any], other: list[Any]) -> bool:
    try:
        return one == other
    except (RuntimeError, TypeError, ValueError):  # of tensors, which have no one answer
        return False
