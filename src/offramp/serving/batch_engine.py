"""Many requests at once: early exits in a continuous batch, from any thread.

One thread owns the model and makes the rounds (`offramp.serving.core`, or `serial` where answers
are written one by one). Worker threads open images, run the processor and, ahead of the decoder,
the vision tower. The queue is bounded: beyond that, requests are refused.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, InvalidStateError, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

from offramp.adapter import Adapter
from offramp.data.example import Example
from offramp.engine.policy import FULL
from offramp.errors import BusyError, InputError
from offramp.models.backbone import Backbone
from offramp.models.cache_salt import salted
from offramp.models.input_processor import InputProcessor
from offramp.models.vision_cache import VisionCache
from offramp.serving.core import EngineCore, checked_inputs
from offramp.serving.engine_config import EngineConfig
from offramp.serving.host import Runtime, is_runtime
from offramp.serving.image_reader import ImageReader
from offramp.serving.request import Handle, OnToken, Request
from offramp.serving.serial import SerialCore

log = logging.getLogger(__name__)
IMAGE_BYTES = 2**28
"""Of the image features that an engine keeps, unless it is given a cache."""


class BatchEngine:
    """A running engine; close it, or use it as a context manager.

    model: an adapter, or a backbone alone; a `LlamaCppRuntime`, whose sequences are the slots; or a
    `SerialCore`, which answers one by one. processor: turns examples into inputs; not needed where
    inputs are submitted. queue: requests that may wait beside those in slots. workers: threads that
    open images, run the processor and, one at a time, the vision tower. on_round: called in the
    engine's thread after every round, or token of a `SerialCore`, behind what it told its requests.
    vision_cache: instead of one of 256 MiB; a `SerialCore` has its own. more: as of `EngineCore`.

    Raises:
        InputError: slots that memory does not hold; a policy that cannot be batched.
    """

    def __init__(
        self,
        model: Adapter | Backbone | Runtime | SerialCore,
        processor: InputProcessor | None = None,
        config: EngineConfig | None = None,
        *,
        queue: int = 64,
        workers: int = 2,
        on_round: Callable[[], None] | None = None,
        vision_cache: VisionCache | None = None,
        **more: Any,
    ) -> None:
        if queue < 1 or workers < 1:
            raise InputError(
                f"An engine with a queue of {queue} and {workers} workers takes no request.",
                "Give numbers from 1.",
            )
        self.core: EngineCore | SerialCore
        self._images: ImageReader | None = None
        if isinstance(model, SerialCore):
            self.core = model
            model.between = self._between
        else:
            adapter = model if isinstance(model, Adapter) else None
            if is_runtime(model):
                adapter, config = model.adapter, _sizes(model, config)
            backbone = adapter.backbone if adapter is not None else cast(Backbone, model)
            if backbone.family.vision is not None:
                vision_cache = vision_cache or VisionCache(IMAGE_BYTES)
                self._images = ImageReader(backbone, vision_cache)
            exits, policy = (adapter.exits, adapter.policy) if adapter else (None, FULL)
            if is_runtime(model):
                more.pop("prefix_cache", None)  # it keeps no prompts
                more["host"] = model.host(policy, vision_cache)
            else:
                more["vision_cache"] = vision_cache
            self.core = EngineCore(backbone, exits, policy, config, **more)
        self.processor, self.queue, self._on_round = processor, queue, on_round
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
        what: Example | Mapping[str, Any],
        *,
        mode: str | None = None,
        thresholds: Mapping[int, float] | None = None,
        seed: int | None = None,
        streamer: Any = None,
        on_token: OnToken | None = None,
        salt: str | None = None,
        wait: bool = False,
        **options: Any,
    ) -> Handle:
        """Queue a request: an example, or what a processor returned for one prompt.

        wait: for a place in a full queue. The rest as in `Request`; options are Hugging Face's.

        Raises:
            BusyError: the queue is full, or the engine closed.
            InputError: a request that no engine could answer.
        """
        inputs: Mapping[str, Any] = {}
        if isinstance(what, Example):
            if self.processor is None:
                raise InputError(
                    "An example was submitted to an engine without a processor.",
                    "Give BatchEngine(..., processor=InputProcessor(backbone, processor)).",
                )
        else:
            inputs = checked_inputs(what)
        request = Request(inputs, mode, thresholds, seed, streamer, on_token, options, salt)
        with self._changed:
            self._take_place(wait)
            handle = Handle(request)  # here, so that it stands in the pool's queue as it arrived
            self._open.add(handle)
            handle.add_done_callback(self._open.discard)
            if isinstance(what, Example) or (self._images and self._images.wanted(inputs)):
                self._preparing.add(handle)
                self._pool.submit(self._prepare, handle, what)
            else:
                self._ready.append(handle)
            self._changed.notify_all()
        return handle

    def map(
        self, examples: Iterable[Example], *, ahead: int | None = None, **options: Any
    ) -> Iterator[tuple[Example, Handle]]:
        """Submit examples and give each back with its finished request, in order of completion.

        Examples are taken as places are free, so that there may be more than memory holds. ahead:
        how many are under way at most (default: slots, and as many again). options: as of `submit`.
        """
        slots = self.core.config.slots
        most = min(2 * slots if ahead is None else max(1, ahead), slots + self.queue)
        under_way: dict[Handle, Example] = {}
        try:
            for example in examples:
                under_way[self.submit(example, wait=True, **options)] = example
                while len(under_way) >= most:
                    yield from _finished(under_way)
            while under_way:
                yield from _finished(under_way)
        finally:  # a caller that stops iterating wants no more
            for handle in under_way:
                self.cancel(handle)

    def cancel(self, handle: Handle) -> bool:
        """End a request, queued or running; its slot is free within one round."""
        asked = handle.cancel()
        with self._changed:
            self._changed.notify_all()
        return asked

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._preparing) + len(self._ready) + self.core.waiting

    @property
    def running(self) -> int:
        """Requests in slots."""
        return self.core.running

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._failed is None and self._thread.is_alive()

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until all that was submitted is answered; False where `timeout` seconds passed, or
        where it is asked for by a callback, on whose return the answers wait."""
        if self._is_mine:
            return not self._open
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, timeout)

    def close(self, *, drain: bool = True) -> None:
        """Take no more requests and stop; those submitted are answered first, or dropped. Where a
        callback asks for it, it does not wait until it has."""
        with self._changed:
            self._closed, self._dropped = True, self._dropped or not drain
            self._changed.notify_all()
        self._pool.shutdown(wait=not self._is_mine)
        if not self._is_mine:
            self._thread.join()

    def __enter__(self) -> BatchEngine:
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
        """For the engine's thread: to others a request on its way to a slot is in neither place."""
        return not self._preparing and not self._ready and self.core.idle

    def _take_place(self, wait: bool) -> None:
        """Raise `BusyError` where the queue has none, unless one is waited for; a callback cannot,
        for places come free behind it."""
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

    def _prepare(self, handle: Handle, what: Example | Mapping[str, Any]) -> None:
        """Open the image, run the processor and the vision tower, in a worker thread."""
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
                self._changed.notify_all()  # who came behind it is next
        try:
            if not unwanted and isinstance(what, Example):
                assert self.processor is not None
                inputs = self.processor.prompts([what])
                handle.request = replace(handle.request, inputs=inputs)
            if not unwanted and self._images is not None:
                with salted(handle.request.salt):
                    self._images.read(handle.request.inputs)
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
        """The engine's thread; where it ends by an error that is no request's, nothing waits on."""
        try:
            self._rounds()
        except BaseException as error:
            log.critical("The engine has failed.", exc_info=error)
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """All requests fail, and no more are taken."""
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


def _sizes(runtime: Runtime, config: EngineConfig | None) -> EngineConfig:
    """A slot for each sequence of a runtime.

    Raises:
        InputError: other sizes were asked for.
    """
    rows, context = runtime.rows, runtime.context
    config = config or EngineConfig(slots=rows, limit=context)
    if config.slots != rows or config.limit > context:
        raise InputError(
            f"The engine has {config.slots} slots of {config.limit} tokens, and the llama.cpp "
            f"runtime {rows} sequences of {context}.",
            f"Load it with EngineOptions(context={config.limit}, sequences={config.slots}).",
        )
    return config


def _failure(error: BaseException) -> BusyError:
    return BusyError(
        f"The engine has failed ({type(error).__name__}: {error}).",
        "Its log says where. Start another one.",
    )


def _finished(under_way: dict[Handle, Example]) -> Iterator[tuple[Example, Handle]]:
    """Take those out that are over, one at least."""
    for handle in wait(list(under_way), return_when=FIRST_COMPLETED).done:
        assert isinstance(handle, Handle)
        yield under_way.pop(handle), handle
