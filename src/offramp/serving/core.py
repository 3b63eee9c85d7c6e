"""The batch engine without its threads: requests in, rounds of work, answers out.

A round drops cancelled requests, reads prompts into free places as far as its budget goes, and
makes one call of the decoder. Everything happens in the thread that makes the rounds.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from offramp.core.decoding.decoder import Decoder
from offramp.core.decoding.policy import FULL, ExitPolicy
from offramp.core.decoding.scheduler import Call, Schedule, Tally
from offramp.core.decoding.sequence import Sequence
from offramp.core.errors import InputError
from offramp.features.cache_salt import salted
from offramp.serving.engine_config import EngineConfig
from offramp.serving.host import Host
from offramp.serving.job import Job, Jobs, Steps, tokens_of

if TYPE_CHECKING:
    from offramp.core.models.backbone import Backbone
    from offramp.core.models.exits import Exits, ExitSet

log = logging.getLogger(__name__)

CALLS = ("read", "feed", "deep", "full")
"""Kinds of call that are counted: a prompt, and the decoder's."""


class Core(Jobs):
    """A decoder with a queue of prompts, driven in rounds.

    host: reads prompts and runs the layers. clock: returns seconds.

    depths: of the exits for requests without a mode of their own, ascending.

    calls, seconds: number and duration of calls of each kind; "read" is a prompt's. tokens: of
    finished answers. tally: counts of what the exits did.
    """

    def __init__(
        self,
        host: Host,
        policy: ExitPolicy,
        config: EngineConfig,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(clock)
        self.policy: ExitPolicy = policy
        self.config: EngineConfig = config
        self._host = host
        self.depths: tuple[int, ...] = host.plan.depths
        self.decoder: Decoder = self._new_decoder()
        self.tally: Tally = self.decoder.tally
        self._reading: Job | None = None
        self._thread: int | None = None
        self.calls: dict[str, int] = dict.fromkeys(CALLS, 0)
        self.seconds: dict[str, float] = dict.fromkeys(CALLS, 0.0)
        self.tokens: int = 0

    def _new_decoder(self) -> Decoder:
        host, config = self._host, self.config
        schedule = config.schedule or Schedule.of(config.slots)
        return host.plan.decoder(host.executor(), schedule, longest=config.longest)

    # -- requests ------------------------------------------------------------------------------

    @property
    def running(self) -> int:
        """The number of unfinished requests outside the queue, with the one whose prompt is being
        read."""
        return len(self.decoder.sequences) + (self._reading is not None)

    @property
    def _seated(self) -> list[Job]:
        return [sequence.owner for sequence in self.decoder.sequences]

    @property
    def cache_use(self) -> float:
        """The share of the slots' columns in use, 0 to 1; any thread may ask."""
        used = 0
        with suppress(RuntimeError, IndexError):  # the engine's thread changes the list meanwhile
            used = sum(sequence.ran[0] for sequence in list(self.decoder.sequences))
        return used / (self.config.slots * self.config.limit)

    # -- rounds --------------------------------------------------------------------------------

    def round(self) -> Call | None:
        """Do a round's work; return the call that was made, or None without a sequence.

        Raises:
            InputError: rounds are made from another thread than before.
        """
        self._check_thread()
        self._drop_unwanted()
        self._admit()
        return self._advance() if self.decoder.sequences else None

    def _advance(self) -> Call:
        """Make one call for the sequences under way, those whose prompts wait having begun."""
        begin = self.clock()
        self.decoder.begin()
        self.seconds["read"] += self.clock() - begin
        call = self.decoder.next_call()
        with self._timed(call):
            self.decoder.make(call)
        self._collect()
        return call

    def run(self) -> None:
        """Make rounds until nothing is left to do."""
        while not self.idle:
            self.round()

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        begin = self.clock()
        yield
        self.calls[kind] += 1
        self.seconds[kind] += self.clock() - begin

    def _check_thread(self) -> None:
        here = threading.get_ident()
        if self._thread is None:
            self._thread = here
        if self._thread != here:
            raise InputError(
                "One engine was driven from two threads.",
                "Let one thread make the rounds; others only submit.",
            )

    def fail_all(self, error: BaseException) -> None:
        """End all requests with `error`."""
        for job in [*self._seated, *self._queue]:
            if not job.handle.done():
                job.handle.set_exception(error)
        self._queue.clear()
        while self.decoder.sequences:
            self.decoder.leave(self.decoder.sequences[-1])

    def _drop_unwanted(self) -> None:
        for sequence in [s for s in self.decoder.sequences if s.owner.handle.unwanted]:
            self.decoder.leave(sequence)
            sequence.owner.handle.drop()
        super()._drop_unwanted()

    def _admit(self) -> None:
        """Read prompts into free slots, one after the other, within the budget of a round."""
        budget = self.config.budget
        while self._queue and len(self.decoder.sequences) < self.config.slots and budget > 0:
            if self.decoder.sequences and self._host.stale(self._queue[0].handle.request):
                break  # what is being written ends by the plan that it began with
            job = self._queue.popleft()
            job.started = self.clock()
            try:
                with self._timed("read"):
                    budget -= self._seat(job)
            except CancelledError:
                job.handle.drop()
            except Exception as error:  # whatever is wrong with a request is its own
                job.handle.set_exception(error)
        self._collect()

    def _meanwhile(self) -> None:
        """Make a call for the sequences under way, between two chunks of a prompt."""
        if self._reading is not None and self._reading.handle.unwanted:
            raise CancelledError
        begin = self.clock()
        self._drop_unwanted()
        if self.decoder.sequences:
            try:
                self._advance()
            except Exception as error:  # of those that share the call, not of the prompt
                for sequence in self.decoder.sequences:
                    sequence.error = sequence.error or error
                self._collect()
        self.seconds["read"] -= self.clock() - begin

    def _seat(self, job: Job) -> int:
        """Read a request's prompt into a free slot; return the tokens of its last chunk."""
        request, host = job.handle.request, self._host
        tokens = host.tokens(request)
        self._check_room(tokens, 0)
        self._reading = job
        try:
            with salted(request.salt):
                if not self.decoder.sequences and host.renew(request):
                    self.decoder.executor.close()
                    self.decoder = self._new_decoder()
                    self.decoder.tally = self.tally
                rule = host.plan.rule(request.mode, request.thresholds, request.point)
                made = host.alone(request, Steps(job, lambda: None), self._check_room)
                if made is not None:
                    self.tokens += len(job.tokens)
                    job.finish(tokens_of(made), made, early_exit=rule.early)
                    return min(tokens, self.config.budget)
                opened = host.open(request, job.settled)
                job.put(opened.ids)
                sampler = opened.sampler
                prompt, [said] = self.decoder.read(
                    opened.reader, opened.given, [sampler], rule, later=True
                )
        finally:
            self._reading = None
        length = int(prompt.columns)
        self._check_room(length, opened.longest)
        job.ids = opened.ids
        with host.plan.heads.computing():
            self.decoder.join(prompt, 0, sampler, rule, said, job)
        return min(max(tokens, length), self.config.budget)

    def _check_room(self, prompt: int, answer: int) -> None:
        """Raise `InputError` where so many tokens of a prompt and its answer do not fit a slot."""
        positions = self._host.positions(prompt) or self.config.limit
        limit = min(self.config.limit, positions)
        if prompt + answer > limit:
            what = "a slot" if limit == self.config.limit else "the backbone's positions, a slot"
            both = f" and an answer of up to {answer} do" if answer else " does"
            raise InputError(
                f"A prompt of {prompt} tokens{both} not fit into {what} of {limit}.",
                "Shorten them (max_new_tokens), or give the engine a larger limit.",
            )

    def _collect(self) -> None:
        """Hand out the answers that are over, and free their slots."""
        for sequence in [s for s in self.decoder.sequences if not s.active]:
            self.decoder.leave(sequence)
            self._finish(sequence, sequence.owner)

    def _finish(self, sequence: Sequence, job: Job) -> None:
        error = sequence.error
        try:
            job.end()
        except Exception as ours:  # the streamer's own
            error = error or ours
        if error is not None:
            job.handle.set_exception(error)
            return
        self.tokens += len(job.tokens)
        output = self._host.output(job.ids, sequence)
        job.finish(sequence.tokens, output, early_exit=sequence.rule.early)


class EngineCore(Core):
    """The core of a backbone in PyTorch and its exits.

    host: reads prompts and runs the layers in PyTorch's place; None: PyTorch. how: as of
    `TorchHost`; its vision_cache and prefix_cache are shared by all requests.
    """

    def __init__(
        self,
        backbone: Backbone,
        exits: ExitSet | Exits | None = None,
        policy: ExitPolicy = FULL,
        config: EngineConfig | None = None,
        *,
        host: Host | None = None,
        clock: Callable[[], float] = time.perf_counter,
        **how: Any,
    ) -> None:
        """Raise `InputError` where the slots would not fit into memory, before any is allocated."""
        from offramp.serving.torch_host import TorchHost

        config = config or EngineConfig()
        if backbone.rounds is not None and config.slots > 1:
            log.warning(
                "%s: requests are answered one at a time, as %s rounds what enters it: in company "
                "their answers would be others.",
                backbone.name,
                backbone.rounds,
            )
            config = replace(config, slots=1)
        own: Host = host or TorchHost(
            backbone, exits, policy, config, between=self._meanwhile, **how
        )
        self.backbone = backbone
        super().__init__(own, policy, config, clock)
