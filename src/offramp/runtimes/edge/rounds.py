"""Answers that several threads wait for, written by one: a slot each, in calls that they share."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from offramp.engine.decoding.decoder import Decoder
from offramp.engine.decoding.rule import ExitRule
from offramp.engine.decoding.scheduler import AT_ONCE, Schedule
from offramp.engine.decoding.sequence import Sequence, Token
from offramp.engine.policy import ExitPolicy
from offramp.errors import InputError
from offramp.runtimes.edge.sampling import Sampler
from offramp.runtimes.llama_cpp.executor import ChainExecutor
from offramp.runtimes.llama_cpp.prompt import Prompt

_BUDGET = 256
"""Tokens of prompts that are read in a round, while those that are being written wait."""

_LOOK = 0.25
"""Seconds after which it is asked again whether anybody still waits."""

OnText = Callable[[str], None]
Gone = Callable[[], bool]


@dataclass(eq=False)
class Job:
    """An answer to be written.

    tokens: of the answer, error: why it failed; once it is over. unwanted: nobody waits any more.
    """

    prompt: Prompt
    sampler: Sampler
    policy: ExitPolicy
    rule: ExitRule
    tokens: list[Token] = field(default_factory=list)
    error: Exception | None = None
    unwanted: bool = False
    _told: SimpleQueue[str | None] = field(default_factory=SimpleQueue)

    def tell(self, text: str) -> None:
        """Hand a part of the answer to whoever waits for it."""
        if text:
            self._told.put(text)

    def end(self, error: Exception | None = None) -> None:
        self.error = error
        self._told.put(None)

    def wait(self, on_text: OnText | None, gone: Gone | None) -> None:
        """Until it is over; `on_text` is told, and `gone` asked, in the thread that waits.

        Raises:
            CancelledError: `gone` said so.
        """
        look = time.monotonic() + _LOOK
        while True:
            try:
                text = self._told.get(timeout=None if gone is None else _LOOK)
            except Empty:
                text = ""
            if text is None:
                return
            if text and on_text is not None:
                on_text(text)
            if gone is not None and time.monotonic() >= look:
                if gone():
                    raise CancelledError
                look = time.monotonic() + _LOOK


def closed() -> InputError:
    return InputError("The model is closed.", "Load it again.")


class Rounds:
    """Writes up to `slots` answers at once; others wait in the order in which they came."""

    def __init__(self, decoder: Callable[[ExitPolicy], Decoder], slots: int) -> None:
        """decoder: makes one, where nothing is being written, for an answer under a policy and for
        whoever joins it."""
        self._make, self._slots = decoder, slots
        self._decoder: Decoder | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="offramp-rounds")
        self._lock = threading.Lock()  # of what follows, which other threads change
        self._queue: deque[Job] = deque()
        self._at_work = self._closed = False

    def write(
        self, job: Job, on_text: OnText | None = None, gone: Gone | None = None
    ) -> list[Token]:
        """Wait until an answer is written. on_text: is told its text as it comes. gone: whether
        nobody waits any more.

        Raises:
            CancelledError: `gone` said so.
            InputError: the rounds are over, or of the request itself.
        """
        with self._lock:
            if self._closed:
                raise closed()
            self._queue.append(job)
            if not self._at_work:
                self._at_work = True
                self._thread.submit(self._work)
        try:
            job.wait(on_text, gone)
        finally:
            job.unwanted = True
        if job.error is not None:
            raise job.error
        return job.tokens

    def close(self) -> None:
        """Finish what is being written; requests that wait for a slot get `InputError`."""
        with self._lock:
            self._closed = True
        self._thread.shutdown()

    # -- the thread that writes ------------------------------------------------------------------

    @property
    def _sequences(self) -> list[Sequence]:
        return [] if self._decoder is None else self._decoder.sequences

    def _work(self) -> None:
        while self._round():
            pass

    def _round(self) -> bool:
        """Read prompts into free slots and make one call; whether anything is left to do."""
        self._collect()
        budget = _BUDGET
        while budget > 0 and (job := self._next()) is not None:
            budget -= self._seat(job)
        try:
            self._call()
        except Exception as error:  # llama.cpp's, so of all that share the call
            for sequence in [*self._sequences]:
                sequence.error = error
        self._collect()
        with self._lock:
            self._at_work = bool(self._queue or self._sequences)
            return self._at_work

    def _next(self) -> Job | None:
        """Who gets a free slot."""
        while len(self._sequences) < self._slots:
            with self._lock:
                if not self._queue:
                    return None
                job = self._queue.popleft()
            if self._closed:
                job.end(closed())
            elif not job.unwanted:
                return job
        return None

    def _seat(self, job: Job) -> int:
        """Read a prompt into a free slot; how many tokens."""
        try:
            if self._decoder is None or not self._decoder.sequences:
                self._decoder = self._make(job.policy)
            decoder, executor = self._decoder, self._decoder.executor
            assert isinstance(executor, ChainExecutor), "which reads prompts itself"
            prompt, [first] = decoder.read(executor, job.prompt, [job.sampler], job.rule)
            decoder.join(prompt, 0, job.sampler, job.rule, first, job)
        except Exception as error:  # whatever is wrong with a request is its own
            job.end(error)
        self._collect()
        return len(job.prompt.states)

    def _call(self) -> None:
        decoder = self._decoder
        if decoder is None or not decoder.sequences:
            return
        company = len(decoder.sequences) > 1
        decoder.schedule = Schedule.of(self._slots) if company else AT_ONCE
        decoder.make(decoder.next_call())

    def _collect(self) -> None:
        """Hand out the answers that are over, and free their slots."""
        if self._decoder is None:
            return
        for sequence in [*self._decoder.sequences]:
            job: Job = sequence.owner
            if sequence.over or sequence.error is not None or job.unwanted:
                self._decoder.leave(sequence)
                job.tokens = sequence.tokens
                job.end(sequence.error)
