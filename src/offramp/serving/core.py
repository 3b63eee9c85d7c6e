"""The batch engine without its threads: requests in, rounds of work, answers out.

A round drops cancelled requests, reads prompts into free places as far as its budget goes, and
makes one call of the decoder. Everything happens in the thread that makes the rounds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, cast

from offramp.engine.decoding.decoder import Decoder
from offramp.engine.decoding.executor import TriedExecutor
from offramp.engine.decoding.pace import Pace
from offramp.engine.decoding.rule import ExitRule
from offramp.engine.decoding.scheduler import AT_ONCE, Call, Schedule
from offramp.engine.decoding.sequence import Sequence
from offramp.engine.policy import FULL, ExitPolicy
from offramp.errors import InputError
from offramp.models.cache_salt import salted
from offramp.serving.engine_config import EngineConfig
from offramp.serving.host import Host
from offramp.serving.job import Job, Jobs
from offramp.serving.request import Request

if TYPE_CHECKING:
    from offramp.models.backbone import Backbone
    from offramp.models.exits import Exits, ExitSet

CALLS = ("read", "feed", "deep", "flush", "full", "trial")
"""Kinds of call that are counted: a prompt, the decoder's, and full depth tried beside it."""


class Core(Jobs):
    """A decoder, a queue of prompts, and the rounds.

    host: what reads prompts and runs the layers. clock: returns seconds. depths: of the exits in
    use, ascending.

    calls, seconds: how many calls of each kind were made, and what they took; "read" is a prompt's.
    tokens: how many were settled in answers that are over. tallies: what the exits did, by whether
    a token might be an exit's (else lossless).
    """

    def __init__(
        self,
        host: Host,
        policy: ExitPolicy,
        config: EngineConfig,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(clock)
        self._host, self.policy, self.config = host, policy, config
        self.depths = host.depths
        self._schedule = self.config.schedule or Schedule.of(self.config.slots)
        self.decoder = Decoder(
            host.layers,
            host.executor(),
            host.reader,
            schedule=self._schedule,
            longest=self.config.longest,
        )
        self.tallies = self.decoder.tallies
        self.pace = Pace(self.config.schedule is not None or not self._can_try, clock)
        self._reading: Job | None = None
        self._thread: int | None = None
        self.calls = dict.fromkeys(CALLS, 0)
        self.seconds = dict.fromkeys(CALLS, 0.0)
        self.tokens = 0

    # -- requests ------------------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Requests being answered, with the one whose prompt is being read."""
        return len(self.decoder.sequences) + (self._reading is not None)

    @property
    def _seated(self) -> list[Job]:
        return [sequence.owner for sequence in self.decoder.sequences]

    @property
    def cache_use(self) -> float:
        """Share of the slots' columns in use, 0 to 1; any thread may ask."""
        used = 0
        with suppress(RuntimeError, IndexError):  # the engine's thread changes the list meanwhile
            used = sum(sequence.ran[0] for sequence in list(self.decoder.sequences))
        return used / (self.config.slots * self.config.limit)

    # -- rounds --------------------------------------------------------------------------------

    def round(self) -> Call | None:
        """Do a round's work; return the call that was made, None where no sequence was there.

        Raises:
            InputError: rounds are made from another thread than before.
        """
        self._check_thread()
        self._drop_unwanted()
        self._admit()
        return self._advance() if self.decoder.sequences else None

    def _advance(self) -> Call:
        """Make one call for the sequences under way."""
        sequences = self.decoder.sequences
        rows, exits = len(sequences), any(s.rule.uses_exits for s in sequences)
        exiting = any(s.rule.exiting for s in sequences)
        # Tokens that may exit wait for no company where exits do not pay.
        pays = not exiting or self.pace.exits_pay(exiting=True)
        self.decoder.schedule = self._schedule if pays else AT_ONCE
        call = self.decoder.next_call()
        if exits and call in ("feed", "full") and self._can_try and self.pace.wants_trial():
            self._try_full_depth()
        before, settled = self.seconds[call], self._settled
        with self._timed(call):
            self.decoder.make(call)
        took = self.seconds[call] - before
        self.pace.note(rows, self._settled - settled, took, exiting=exiting, exits=exits)
        self._collect()
        return call

    @property
    def _settled(self) -> int:
        return sum(sequence.settled for sequence in self.decoder.sequences)

    @property
    def _can_try(self) -> bool:
        """Whether full depth can be tried beside the exits without leaving traces."""
        return hasattr(self.decoder.executor, "trial")

    def _try_full_depth(self) -> None:
        """Time a call at full depth. What it writes is written again by the calls that follow, and
        what it reads means nothing where columns wait below: it takes as long."""
        sequences, executor = self.decoder.sequences, cast(TriedExecutor, self.decoder.executor)
        with self._timed("trial"):
            begin = self.clock()
            with self._host.reader.computing():
                final = executor.trial(
                    [s.handle for s in sequences],
                    [s.feed for s in sequences],
                    [s.ran[0] for s in sequences],
                )
                self._host.reader.logits(final).argmax(-1).tolist()
            self.pace.tried(len(sequences), self.clock() - begin)

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
        """Between two chunks of a prompt: a call for the sequences under way."""
        if self._reading is not None and self._reading.handle.unwanted:
            raise CancelledError
        begin = self.clock()
        self._drop_unwanted()
        if self.decoder.sequences:
            self._advance()
        self.seconds["read"] -= self.clock() - begin

    def _seat(self, job: Job) -> int:
        """Read the prompt of a request into a free slot; how many tokens, of the last chunk."""
        request, host = job.handle.request, self._host
        policy, job.instead = self._policy(request)
        drafts = policy.lossless and host.drafting is not None
        rule = cast(ExitRule, host.drafting) if drafts else host.rule(policy)
        tokens = host.tokens(request)
        self._check_room(tokens, 0)
        self._reading = job
        try:
            with salted(request.salt):
                opened = host.open(request, policy, job.settled)
                if opened.executor is not None:
                    self.decoder.executor = opened.executor
                    self.decoder.depths = opened.executor.depths
                job.put(opened.ids)
                sampler = opened.sampler
                prompt, [said] = self.decoder.read(opened.reader, opened.given, [sampler], rule)
        finally:
            self._reading = None
        length = int(prompt.columns)
        self._check_room(length, opened.longest)
        job.ids = opened.ids
        with host.reader.computing():
            self.decoder.join(prompt, 0, sampler, rule, said, job)
        return min(max(tokens, length), self.config.budget)

    def _policy(self, request: Request) -> tuple[ExitPolicy, bool | None]:
        """How a request is answered; and where that is at full depth because exits were found not
        to pay, whether its tokens might have exited."""
        policy = request.exit_policy(self.policy, self.depths)
        exiting = bool(policy.thresholds) and not policy.lossless
        free = request.mode is None and request.thresholds is None
        drafts = policy.lossless and self._host.drafting is not None
        may = drafts or (bool(policy.effective.thresholds) and (policy.lossless or free))
        if may and not self.pace.exits_pay(exiting=exiting):
            return FULL, exiting
        return policy, None

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
        for sequence in [s for s in self.decoder.sequences if s.over or s.error is not None]:
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
        if job.instead is not None:
            self.pace.answered(exiting=job.instead)
        output = self._host.output(job.ids, sequence)
        job.finish(sequence.tokens, output, early_exit=sequence.rule.exiting)


class EngineCore(Core):
    """The same of a backbone in PyTorch and its exits.

    host: what reads prompts and runs the layers in PyTorch's place; None: PyTorch, how: as of
    `TorchHost`, whose vision_cache and prefix_cache are what requests with an image, or the
    beginning of a prompt, in common share.
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
        from offramp.engine.decoding.exit_reader import check_company
        from offramp.serving.torch_host import TorchHost

        config = config or EngineConfig()
        check_company(policy)
        if host is None:
            host = TorchHost(backbone, exits, policy, config, between=self._meanwhile, **how)
        self.backbone = backbone
        super().__init__(host, policy, config, clock)
