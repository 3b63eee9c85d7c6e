"""Requests one after the other, each answered whole by `generate`.

For what slots do not hold: a runtime in PyTorch's place, or layers that keep a state instead of
keys and values. It has the face of `EngineCore`; a round is an answer.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

from offramp.adapter.adapter import Adapter
from offramp.adapter.answers import Model, generate_by
from offramp.core.decoding.policy import FULL, ExitPolicy, GenerationOutput
from offramp.core.decoding.scheduler import Tally
from offramp.core.models.backbone import Backbone
from offramp.features.cache_salt import salted
from offramp.features.prefix_cache import PrefixCache
from offramp.features.vision_cache import VisionCache
from offramp.serving.engine_config import EngineConfig
from offramp.serving.job import Job, Jobs, Steps, tokens_of


class SerialCore(Jobs):
    """A core that answers one request at a time.

    model: an adapter, a backbone, or a runtime. policy: of requests without one; None: the
    adapter's. limit: tokens of a prompt and its answer. vision_cache, prefix_cache: as of
    `generate`; runtimes have no prefix cache. clock: returns seconds. between: called after each
    token of an answer.

    tokens: of finished answers.
    """

    def __init__(
        self,
        model: Model,
        policy: ExitPolicy | None = None,
        *,
        limit: int = 1024,
        vision_cache: VisionCache | None = None,
        prefix_cache: PrefixCache | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        own = model.policy if isinstance(model, Adapter) else FULL
        self.policy: ExitPolicy = own if policy is None else policy
        self.config: EngineConfig = EngineConfig(slots=1, limit=limit)
        super().__init__(clock)
        self.between: Callable[[], None] = lambda: None
        self.depths: tuple[int, ...] = self.policy.depths
        self.tally: Tally = Tally()
        self.tokens: int = 0
        self._model = model
        self._shared: dict[str, Any] = {}
        if vision_cache is not None:
            self._shared["vision_cache"] = vision_cache
        if prefix_cache is not None and isinstance(model, Adapter | Backbone):
            self._shared["prefix_cache"] = prefix_cache
        self._job: Job | None = None

    @property
    def _seated(self) -> list[Job]:
        return [] if self._job is None else [self._job]

    @property
    def cache_use(self) -> float:
        """The share of the `limit` tokens that the current answer uses, 0 to 1."""
        job = self._job
        if job is None:
            return 0.0
        prompt = int(job.handle.request.inputs["input_ids"].shape[-1])
        return (prompt + len(job.tokens)) / self.config.limit

    def round(self) -> None:
        """Answer the next request."""
        self._drop_unwanted()
        if not self._queue:
            return
        self._job = job = self._queue.popleft()
        job.started = self.clock()
        try:
            self._answer(job)
        except CancelledError:
            job.handle.drop()
        except Exception as error:  # whatever is wrong with a request is its own
            job.handle.set_exception(error)
        finally:
            self._job = None

    def fail_all(self, error: BaseException) -> None:
        """End all waiting requests with `error`."""
        while self._queue:
            self._queue.popleft().handle.set_exception(error)

    def _answer(self, job: Job) -> None:
        request = job.handle.request
        policy = self.policy.asked(request.mode, request.thresholds, self.depths, request.point)
        # Without a seed any will do, but not PyTorch's own, which is other requests' too.
        seed = secrets.randbits(63) if request.seed is None else request.seed
        own = {"streamer": Steps(job, self._pause), "seed": seed}
        options = {**request.options, **self._shared, **own}
        with salted(request.salt):
            output = generate_by(self._model, request.inputs, policy, options)
        self._count(output, policy)
        job.finish(tokens_of(output), output, early_exit=policy.own_mode == "early_exit")

    def _pause(self) -> None:
        self._drop_unwanted()
        self.between()

    def _count(self, output: GenerationOutput, policy: ExitPolicy) -> None:
        """Note what the exits did."""
        tokens, tally = output.depths.numel(), self.tally
        self.tokens += tokens
        if policy.drafting:
            tally.drafted += sum(drafted for drafted, _ in output.rounds)
            tally.accepted += sum(accepted for _, accepted in output.rounds)
        elif policy.thresholds:
            exited = int((output.depths < output.layers).sum())
            tally.exited += exited
            tally.waited += tokens - exited
