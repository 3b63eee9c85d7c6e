"""Many requests at once, from any thread: what every engine shares, with PyTorch or without it.

One thread owns the model and makes the rounds (`offramp.serving.core`, or `serial` where answers
are written one by one). Worker threads prepare what is not ready for the model. The queue is
bounded: beyond that, requests are refused.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol, Self

from offramp.core.decoding.scheduler import Tally
from offramp.core.errors import BusyError, InputError
from offramp.serving.engine_config import EngineConfig
from offramp.serving.request import Handle, OnToken, Request

log = logging.getLogger(__name__)

Prepare = Callable[[Request], Mapping[str, Any]]
"""Makes a request's inputs."""


class Rounds(Protocol):
    """An object whose rounds an engine's thread drives: an `offramp.serving.core.Core`, or a core
    that answers one request after the other.

    depths: of the exits in use. tally: counts of what the exits did.
    """

    @property
    def config(self) -> EngineConfig: ...
    @property
    def depths(self) -> tuple[int, ...]: ...
    @property
    def tally(self) -> Tally: ...
    @property
    def waiting(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def idle(self) -> bool: ...
    @property
    def queued(self) -> set[Handle]: ...
    @property
    def cache_use(self) -> float: ...
    def add(self, request: Request | Handle) -> Handle: ...
    def round(self) -> Any: ...
    def cancel_all(self) -> None: ...
    def fail_all(self, error: BaseException) -> None: ...


class Engine:
    """A running engine; close it, or use it as a context manager.

    core: makes the rounds. queue: requests that may wait beside those in slots. workers: threads
    that prepare inputs. on_round: called in the engine's thread after every round, once its
    requests were told.
    """

    def __init__(
        self,
        core: Rounds,
        *,
        queue: int = 64,
        workers: int = 2,
        on_round: Callable[[], None] | None = None,
    ) -> None:
        """Raise `InputError` for a queue or workers below 1."""
        check_sizes(queue, workers)
        self.core = core
        self.queue: int = queue
        self._on_round = on_round
        self._most_ahead = self.core.config.slots
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="offramp-input")
        self._changed = threading.Condition()
        self._preparing: set[Handle] = set()
        self._ready: list[Handle] = []
        self._ahead: set[Handle] = set()  # being prepared, or ready and without a slot
        self._open: set[Handle] = set()  # without an answer
        self._failed: BaseException | None = None
        self._closed = self._dropped = False
        self._thread = threading.Thread(target=self._serve, name="offramp-engine", daemon=True)
        self._thread.start()

    # -- requests ------------------------------------------------------------------------------

    def submit(
        self,
        what: Any,
        *,
        mode: str | None = None,
        thresholds: Mapping[int, float] | None = None,
        seed: int | None = None,
        streamer: Any = None,
        on_token: OnToken | None = None,
        salt: str | None = None,
        point: Mapping[int, float] | None = None,
        wait: bool = False,
        **options: Any,
    ) -> Handle:
        """Queue a request: the inputs of one prompt, or an object from which the workers make them.

        wait: whether to wait for a place in a full queue. The others as in `Request`.

        Raises:
            BusyError: the queue is full, or the engine closed.
            InputError: a request that no engine could answer.
        """
        inputs, prepare = self._taken(what)
        request = Request(inputs, mode, thresholds, seed, streamer, on_token, options, salt, point)
        with self._changed:
            self._take_place(wait)
            handle = Handle(request)  # here, so that it stands in the pool's queue as it arrived
            self._open.add(handle)
            handle.add_done_callback(self._open.discard)
            if prepare is not None:
                self._preparing.add(handle)
                self._pool.submit(self._prepare, handle, prepare)
            else:
                self._ready.append(handle)
            self._changed.notify_all()
        return handle

    def _taken(self, what: Any) -> tuple[Mapping[str, Any], Prepare | None]:
        """Return a request's inputs and, where a worker has something to do before they are ready,
        what it does.

        Raises:
            InputError: the engine takes no such thing.
        """
        return what, None

    def cancel(self, handle: Handle) -> bool:
        """End a request, queued or running; its slot is free within one round."""
        asked = handle.cancel()
        with self._changed:
            self._changed.notify_all()
        return asked

    @property
    def waiting(self) -> int:
        """The number of requests without a slot."""
        return len(self._preparing) + len(self._ready) + self.core.waiting

    @property
    def running(self) -> int:
        """The number of requests in slots."""
        return self.core.running

    @property
    def alive(self) -> bool:
        """Return True if the engine's thread runs."""
        return self._failed is None and self._thread.is_alive()

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until all submitted requests are answered; return False after `timeout` seconds, or
        if a callback of the engine calls it, on whose return the answers wait."""
        if self._is_mine:
            return not self._open
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, timeout)

    def close(self, *, drain: bool = True) -> None:
        """Take no more requests and stop; submitted ones are answered first (drain), or dropped.
        Called from a callback of the engine, return at once."""
        with self._changed:
            self._closed, self._dropped = True, self._dropped or not drain
            self._changed.notify_all()
        self._pool.shutdown(wait=not self._is_mine)
        if not self._is_mine:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close(drain=error[0] is None)

    # -- threads -------------------------------------------------------------------------------

    @property
    def _is_mine(self) -> bool:
        """Whether the engine's own thread asks, in which callbacks run."""
        return threading.current_thread() is self._thread

    @property
    def _idle(self) -> bool:
        """Whether no request is queued or running; only the engine's thread sees those between."""
        return not self._preparing and not self._ready and self.core.idle

    def _take_place(self, wait: bool) -> None:
        """Raise `BusyError` where the queue has none, unless one is waited for; a callback cannot,
        for places come free after it."""
        if wait and not self._is_mine:
            self._changed.wait_for(lambda: self._closed or self.waiting < self.queue)
        if self._failed is not None:
            raise _failure(self._failed)
        if self._closed:
            raise BusyError("The engine is closed.", "Start another one.")
        if self.waiting >= self.queue:
            raise BusyError(
                f"The engine's queue of {self.queue} requests is full.",
                "Try again later, or submit with wait=True.",
            )

    def _prepare(self, handle: Handle, prepare: Prepare) -> None:
        """Make a request's inputs ready, in a worker thread."""
        error: Exception | None = None
        with self._changed:  # what lies ready takes memory
            self._changed.wait_for(
                lambda: (
                    self._dropped
                    or self._failed is not None
                    or handle.unwanted
                    or (len(self._ahead) < self._most_ahead and self._is_next(handle))
                )
            )
            unwanted = self._dropped or handle.unwanted
            if not unwanted:
                self._ahead.add(handle)
                self._changed.notify_all()  # who came after it is next
        try:
            if not unwanted:
                handle.request = replace(handle.request, inputs=prepare(handle.request))
        except Exception as found:  # a broken image is its request's own
            error = found
        with self._changed:
            self._preparing.discard(handle)
            if self._failed is not None:
                return  # it has failed with all others
            if error is not None:
                self._ahead.discard(handle)
                handle.set_exception(error)
            else:
                self._ready.append(handle)
            self._changed.notify_all()

    def _is_next(self, handle: Handle) -> bool:
        """Whether nobody came before it who is still to be prepared: workers ask in any order."""
        waiting = self._preparing - self._ahead
        return all(other.arrival >= handle.arrival or other.unwanted for other in waiting)

    def _serve(self) -> None:
        """Run the engine's thread; where it ends by an error of its own, all requests fail."""
        try:
            self._rounds()
        except BaseException as error:
            log.critical("The engine has failed.", exc_info=error)
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Fail all requests, and take no more."""
        with self._changed:
            self._failed, self._closed, self._dropped = error, True, True
            self._preparing.clear()
            self._ready.clear()
            self._changed.notify_all()
        for handle in list(self._open):
            with suppress(InvalidStateError):  # it was answered just now
                handle.set_exception(_failure(error))
        with self._changed:
            self._changed.notify_all()  # who drains
        if self._on_round is not None:
            with suppress(BaseException):  # it may be what has failed
                self._on_round()

    def _rounds(self) -> None:
        """Make rounds while there is work."""
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._ready or not self.core.idle or (self._closed and self._idle)
                )
                self._take_in()
                if self._closed and self._idle:
                    return
            try:
                self.core.round()
            except Exception as error:  # the model itself failed: so did all requests in the batch
                self.core.fail_all(error)
            self._between()

    def _between(self) -> None:
        """Tell what was done, and take in what came meanwhile; the engine's thread."""
        if self._on_round is not None:
            self._on_round()
        with self._changed:
            self._take_in()
            self._changed.notify_all()

    def _take_in(self) -> None:
        for handle in self._ready:
            self.core.add(handle)
        self._ready.clear()
        if self._ahead:
            self._ahead &= self.core.queued | self._preparing
        if self._dropped:
            self.core.cancel_all()


def _failure(error: BaseException) -> BusyError:
    return BusyError(
        f"The engine has failed ({type(error).__name__}: {error}).",
        "Its log says where. Start another one.",
    )


def check_sizes(queue: int, workers: int) -> None:
    """Raise `InputError` where the queue or the number of workers is below 1."""
    if queue < 1 or workers < 1:
        raise InputError(
            f"An engine with a queue of {queue} and {workers} workers takes no request.",
            "Give numbers from 1.",
        )
