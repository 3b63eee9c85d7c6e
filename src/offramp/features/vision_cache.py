"""Image features, computed once for each image: several questions on it share them.

The vision tower is a large part of a short answer. It is frozen and reads nothing but the image,
so what it returned for the same pixels is what it would return again, while its weights are what
they were.
"""

from __future__ import annotations

import copy
import hashlib
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from cachetools import LRUCache
from torch import Tensor, nn

from offramp.core.errors import InputError
from offramp.core.models.change import state_of
from offramp.core.models.in_place_of import InPlaceOf
from offramp.features.cache_salt import current_salt


class VisionCache:
    """Outputs of vision towers, by the tower, a digest of its arguments and the current salt
    (`offramp.features.cache_salt`). Thread-safe.

    The least recently used are dropped. hits, misses: numbers of tower calls that were and were not
    answered from here. nbytes: of the tensors held, never above `max_bytes`.

    Raises:
        InputError: `max_bytes` is not above 0.
    """

    def __init__(self, max_bytes: int = 2**30) -> None:
        if max_bytes <= 0:
            raise InputError(
                f"A vision cache of {max_bytes} bytes holds nothing.",
                "Give a size above 0, or use no cache.",
            )
        self.max_bytes = max_bytes
        self.hits: int = 0
        self.misses: int = 0
        # By a reference that does not keep the tower: another one is never taken for it.
        self._held: LRUCache[tuple[Any, ...], Any] = LRUCache(
            max_bytes, getsizeof=lambda kept: _nbytes(kept[1])
        )
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        return int(self._held.currsize)

    def before(self, tower: nn.Module) -> RememberedTower:
        """Return a module for the tower's place that looks in this cache first."""
        return RememberedTower(tower, self)

    def call(self, tower: nn.Module, args: tuple[Any, ...], kw: dict[str, Any]) -> Any:
        """Return the result of `tower(*args, **kw)`; its tensors are shared between calls."""
        key = (weakref.ref(tower), digest([*args, kw]), current_salt())
        version = state_of(tower)
        with self._lock:
            weights, cached = self._held.get(key, (None, None))
            if weights != version:
                cached = None
            if cached is None:
                self.misses += 1
            else:
                self.hits += 1
        if cached is not None:
            return copy.copy(cached)
        # Outside the lock: two threads may run the same image, but none waits for another's.
        output = tower(*args, **kw)
        if _nbytes(output) <= self.max_bytes:
            with self._lock:
                self._held[key] = version, copy.copy(output)
        return output


class RememberedTower(InPlaceOf):
    """A module in the place of an intercepted model's vision tower that looks in the cache
    first."""

    def __init__(self, tower: nn.Module, cache: VisionCache) -> None:
        super().__init__(tower)
        self.__dict__["_cache"] = cache

    def __call__(self, *args: Any, **kw: Any) -> Any:
        return self._cache.call(self._own, args, kw)


def digest(value: Any) -> str:
    """Return the digest of nested arguments, their tensors bit for bit."""
    made = hashlib.blake2b(digest_size=16)
    for part in _parts(value):
        if isinstance(part, Tensor):
            made.update(f"{part.dtype} {tuple(part.shape)} {part.device}".encode())
            flat = part.detach().contiguous().cpu().flatten()
            made.update(flat.view(torch.uint8).numpy().tobytes())
        else:
            made.update(repr(part).encode())
    return made.hexdigest()


def _nbytes(value: Any) -> int:
    return sum(part.nbytes for part in _parts(value) if isinstance(part, Tensor))


def _parts(value: Any) -> Iterator[Any]:
    """Tensors and plain values of nested arguments or outputs, in order."""
    if isinstance(value, Mapping):
        for name in value:
            yield name
            yield from _parts(value[name])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _parts(item)
    else:
        yield value
