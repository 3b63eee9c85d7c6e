"""The batch engine without its threads: requests in, rounds of work, answers out.

A round drops cancelled requests, reads prompts into free slots as far as its budget goes, and makes
one call. Everything happens in the thread that makes the rounds.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

from offramp.engine.policy import FULL, ExitPolicy, first_token_may_exit
from offramp.engine.prefix_cache import PrefixCache
from offramp.engine.slots.cache import check_memory, slot_bytes
from offramp.engine.slots.memory import free_bytes
from offramp.engine.slots.prompt import PromptReader
from offramp.errors import InputError, UnsupportedBackboneError
from offramp.models.backbone import Backbone
from offramp.models.cache_salt import salted
from offramp.models.exits import Exits, ExitSet
from offramp.models.vision_cache import VisionCache
from offramp.serving.job import Job, enqueue
from offramp.serving.request import Handle, Request
from offramp.serving.rows.rules import RowRules
from offramp.serving.rows.slot_batch import RowPolicy, Seat, SlotBatch
from offramp.serving.schedule.pace import Pace
from offramp.serving.schedule.scheduler import Call, Load, Schedule, Tally


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of a batch engine.

    slots: rows written at once. limit: tokens of one row, prompt and answer. budget: prompt tokens
    read in a round, while the rows being written wait; a longer prompt is read in as many rounds as
    it takes, where its family allows. longest: tokens of a row that may wait before the deep
    layers. guess_above: score from which an exit's token is worth a guess. layout: of the deep call
    (`offramp.engine.slots.layout`). schedule: of the calls, exits being used whether they pay or
    not; None: the engine finds out from what its calls take.

    Raises:
        InputError: a number below 1.
    """

    slots: int = 8
    limit: int = 1024
    budget: int = 256
    longest: int = 64
    guess_above: float = 0.0
    layout: str | None = None
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        sizes = {n: getattr(self, n) for n in ("slots", "limit", "budget", "longest")}
        wrong = {n: v for n, v in sizes.items() if type(v) is not int or v < 1}
        if wrong:
            raise InputError(
                f"The engine cannot run with {', '.join(f'{n}={v!r}' for n, v in wrong.items())}.",
                "Give whole numbers from 1.",
            )


class EngineCore:
    """Slots, a queue of prompts, and the rounds.

    vision_cache, prefix_cache: what requests with an image, or the beginning of a prompt, in common
    share; without, all of it is run. clock: returns seconds.

    calls, seconds: how many calls of each kind were made, and what they took; "read" is a prompt's.
    tokens: how many were settled in answers that are over.
    """

    def __init__(
        self,
        backbone: Backbone,
        exits: ExitSet | Exits | None = None,
        policy: ExitPolicy = FULL,
        config: EngineConfig | None = None,
        *,
        vision_cache: VisionCache | None = None,
        prefix_cache: PrefixCache | None = None,
        clock: Callable[[], float] = time.perf_counter,
        make_batch: Callable[..., SlotBatch] = SlotBatch,
    ) -> None:
        """Raise `InputError` where the slots would not fit into memory, before any is allocated."""
        if backbone.sharded:
            raise UnsupportedBackboneError(
                f"{backbone.name} is spread over several devices, and the engine runs on one.",
                "Load it on one device, or decode with offramp.generate.",
            )
        config = config or EngineConfig()
        entries = backbone.depth + (len(exits.entries) if exits is not None else 0)
        size = config.slots * slot_bytes(
            backbone.text_config, entries, config.limit, backbone.dtype
        )
        check_memory(size, free_bytes(backbone.device), config.slots, config.limit)
        self.config, self.policy, self.clock = config, policy, clock
        self.batch = make_batch(
            backbone,
            exits,
            policy,
            slots=config.slots,
            limit=config.limit,
            layout=config.layout,
            longest=config.longest,
            guess_above=config.guess_above,
        )
        self.pace = Pace(
            config.schedule,
            self.batch.tallies,
            slots=config.slots,
            longest=config.longest,
            share=self.batch.runner.split / backbone.depth,
            clock=clock,
        )
        self._reader = PromptReader(
            backbone,
            exits,
            self.depths,
            vision_cache=vision_cache,
            prefix_cache=prefix_cache,
            first_may_exit=first_token_may_exit(backbone, policy),
            chunk=config.budget,
            between=self._meanwhile,
        )
        self._queue: deque[Job] = deque()
        self._reading: Job | None = None
        self._thread: int | None = None
        self.calls = dict.fromkeys(("read", *get_args(Call)), 0)
        self.seconds = dict.fromkeys(self.calls, 0.0)
        self.tokens = 0

    # -- requests ------------------------------------------------------------------------------

    def add(self, request: Request | Handle) -> Handle:
        """Queue a request; any thread may. Its answer comes with the rounds."""
        handle = request if isinstance(request, Handle) else Handle(request)
        enqueue(self._queue, Job(handle, self.clock))
        return handle

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def queued(self) -> set[Handle]:
        """Those in the queue; for the thread that makes the rounds."""
        return {job.handle for job in self._queue}

    @property
    def running(self) -> int:
        """Requests being answered, with the one whose prompt is being read."""
        return len(self.batch.seats) + (self._reading is not None)

    @property
    def depths(self) -> tuple[int, ...]:
        """Of the exits in use, ascending."""
        return self.batch.depths

    @property
    def tallies(self) -> Mapping[bool, Tally]:
        """What the exits did, by whether a row's tokens might exit (else lossless)."""
        return self.batch.tallies

    @property
    def cache_use(self) -> float:
        """Share of the slots' columns in use, 0 to 1; any thread may ask."""
        used = 0
        with suppress(RuntimeError, IndexError):  # the engine's thread changes the list meanwhile
            used = sum(seat.row.start + seat.row.fed for seat in list(self.batch.seats))
        return used / (self.config.slots * self.config.limit)

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not self._queue and not self.running

    # -- rounds --------------------------------------------------------------------------------

    def round(self) -> Call | None:
        """Do a round's work; return the call that was made, None where no row was there.

        Raises:
            InputError: rounds are made from another thread than before.
        """
        self._check_thread()
        self._drop_unwanted()
        self._admit()
        return self._advance() if self.batch.seats else None

    def _advance(self) -> Call:
        """Make one call for the rows in slots."""
        call = self._next_call()
        made: dict[Call, Callable[[], int]] = {
            "shallow": self.batch.shallow,
            "deep": self.batch.deep,
            "flush": partial(self.batch.deep, flush=True),
            "step": self.batch.step,
            "full": self.batch.full,
        }
        before = self.seconds[call]
        with self._timed(call):
            tokens = made[call]()
        self.pace.note(call, tokens, self.seconds[call] - before)
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
        for job in [*(seat.owner for seat in self.batch.seats), *self._queue]:
            if not job.handle.done():
                job.handle.set_exception(error)
        self._queue.clear()
        while self.batch.seats:
            self.batch.leave(self.batch.seats[-1])

    def cancel_all(self) -> None:
        """Ask for the end of all requests; the next round drops them."""
        for job in [*(seat.owner for seat in self.batch.seats), *self._queue]:
            job.handle.cancel()

    def _next_call(self) -> Call:
        policies = [seat.policy for seat in self.batch.seats]
        return self.pace.next_call(
            Load.of([seat.row for seat in self.batch.seats], self.config.longest),
            exits=any(policy.uses_exits for policy in policies),
            exiting=any(policy.thresholds for policy in policies),
        )

    def _drop_unwanted(self) -> None:
        for seat in [s for s in self.batch.seats if s.owner.handle.unwanted]:
            self.batch.leave(seat)
            seat.owner.handle.drop()
        for job in [job for job in self._queue if job.handle.unwanted]:
            self._queue.remove(job)
            job.handle.drop()

    def _admit(self) -> None:
        """Read prompts into free slots, one after the other, within the budget of a round."""
        budget = self.config.budget
        while self._queue and len(self.batch.seats) < self.config.slots and budget > 0:
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
        """Between two chunks of a prompt: a call for the rows in slots."""
        if self._reading is not None and self._reading.handle.unwanted:
            raise CancelledError
        begin = self.clock()
        self._drop_unwanted()
        if self.batch.seats:
            self._advance()
        self.seconds["read"] -= self.clock() - begin

    def _seat(self, job: Job) -> int:
        """Read the prompt of a request into a free slot; how many tokens, of the last chunk."""
        request = job.handle.request
        pays = self.pace.exits_pay
        policy = RowPolicy.of(request.exit_policy(self.policy, self.depths, pays=pays))
        tokens = int(request.inputs["input_ids"].shape[-1])
        if not self.batch.backbone.is_encoder_decoder:  # else these are the encoder's
            self._check_room(tokens, 0)
        self._reading = job
        try:
            with salted(request.salt):
                prompt = self._reader.read(
                    request.inputs, request.options, use_exits=policy.uses_exits
                )
        finally:
            self._reading = None
        rules = RowRules(prompt, seed=request.seed, streamer=job, on_choice=job.settled)
        own = getattr(prompt.cache, "self_attention_cache", prompt.cache)
        length = int(own.get_seq_length())
        self._check_room(length, rules.most or 0)
        self.batch.join(prompt, rules, policy, job)
        return min(max(tokens, length), self.config.budget)

    def _check_room(self, prompt: int, answer: int) -> None:
        """Raise `InputError` where so many tokens of a prompt and its answer do not fit a slot."""
        positions = self.batch.backbone.positions or self.config.limit
        limit = min(self.config.limit, positions)
        if prompt + answer > limit:
            what = "a slot" if limit == self.config.limit else "the backbone's positions, a slot"
            raise InputError(
                f"A prompt of {prompt} tokens and an answer of up to {answer} do not fit into "
                f"{what} of {limit}.",
                "Shorten them (max_new_tokens), or give the engine a larger limit.",
            )

    def _collect(self) -> None:
        """Hand out the answers that are over, and free their slots."""
        for seat in [s for s in self.batch.seats if s.over or s.error is not None]:
            self.batch.leave(seat)
            self._finish(seat, seat.owner)

    def _finish(self, seat: Seat, job: Job) -> None:
        error = seat.error
        try:
            seat.rules.finish()
        except Exception as ours:  # the streamer's own
            error = error or ours
        if error is not None:
            job.handle.set_exception(error)
            return
        self.tokens += len(job.tokens)
        self.pace.answered(len(job.tokens))
        job.finish(self.batch.result(seat), early_exit=bool(seat.policy.thresholds))


def checked_inputs(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Raise `InputError` where `inputs` are not a processor's of one prompt."""
    if "input_ids" not in inputs:
        raise InputError(
            f"A request came without token ids (it has {', '.join(inputs) or 'nothing'}).",
            "Pass what the processor returned: processor(images=image, text=prompt, "
            "return_tensors='pt').",
        )
    return inputs
