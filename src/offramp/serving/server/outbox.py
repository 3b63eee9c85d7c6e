"""From the engine's thread to the event loop: what a round brought, in one call.

A call into the loop wakes its thread, and the two then wait for each other's lock on Python. One
call a token held the engine up for as long as the tokens took.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from typing import Any, Protocol


class Sink(Protocol):
    """A receiver of items in the event loop's thread, such as a queue of asyncio's."""

    def put_nowait(self, item: Any, /) -> None: ...


class Outbox:
    """A queue from any thread to sinks in the event loop's thread."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news: deque[tuple[Sink, Any]] = deque()

    def open(self) -> None:
        """Remember the running event loop."""
        self._loop = asyncio.get_running_loop()

    def put(self, sink: Sink, what: Any) -> None:
        """Queue an item for a sink, until the next flush."""
        self._news.append((sink, what))

    def flush(self) -> None:
        """Hand the queued items to their sinks."""
        news = []
        with suppress(IndexError):  # another thread may take the last one
            while self._news:
                news.append(self._news.popleft())
        if news and self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended, and with it who asked
                self._loop.call_soon_threadsafe(_deliver, news)


def _deliver(news: list[tuple[Sink, Any]]) -> None:
    for sink, what in news:
        sink.put_nowait(what)
