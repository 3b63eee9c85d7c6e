"""Whose a kept value is: caches that several users share tell none of them what others asked.

A prompt or an image that is kept is answered faster, and the time tells that somebody asked it
before. So what is kept under one salt is found under the same salt alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_salt: ContextVar[str | None] = ContextVar("salt", default=None)


def current_salt() -> str | None:
    """Return the salt for cache keys in this thread; None: entries are shared by everybody."""
    return _salt.get()


@contextmanager
def salted(salt: str | None) -> Iterator[None]:
    """Use this salt for all cache keys in this thread, while the context is open."""
    token = _salt.set(salt)
    try:
        yield
    finally:
        _salt.reset(token)
