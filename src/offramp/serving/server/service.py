"""The engine as a service: requests are admitted, answered and counted."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from offramp.core.decoding.policy import ExitPolicy
from offramp.core.errors import OfframpError
from offramp.promises.likeness import Alarm, look_of
from offramp.promises.prompt_kinds import OTHER
from offramp.promises.verdict import Status, Verdict, decide
from offramp.serving.engine import Engine
from offramp.serving.request import Completion, Handle
from offramp.serving.server.api.protocol import Sampling
from offramp.serving.server.config import ServerConfig
from offramp.serving.server.errors import ApiError
from offramp.serving.server.inputs.images import ImageSource, is_far
from offramp.serving.server.inputs.prompts import Prompter
from offramp.serving.server.metrics import Metrics
from offramp.serving.server.outbox import Outbox
from offramp.serving.server.served import Inputs, Served


@dataclass(frozen=True)
class Use:
    """The use that an answer makes of the exits, as of `BatchEngine.submit`. named: the mode in
    words. trust: that the request names, in place of the policy's.

    fell_back: whether the adapter's own thresholds were replaced because its guarantee is broken.
    point: of the calibrated path, for the prompt's kind.
    """

    mode: str | None
    thresholds: Mapping[int, float] | None
    named: str
    fell_back: bool = False
    point: Mapping[int, float] | None = None
    trust: float | None = None

    @property
    def own(self) -> bool:
        """Return True unless the request names thresholds, or a trust."""
        return self.thresholds is None and self.trust is None


class Place:
    """Room for some answers. The room of an answer is given back when the engine is done with it,
    and all of it when nobody waits any more."""

    def __init__(self, service: Service, answers: int) -> None:
        self._service, self._answers = service, answers

    def put_nowait(self, answers: int) -> None:
        """Give room for `answers` answers back, if not given back yet; in the event loop's
        thread."""
        back = min(answers, self._answers)
        self._service.under_way -= back
        self._answers -= back

    def leave(self) -> None:
        """Give all room back; a second call changes nothing."""
        self.put_nowait(self._answers)


log = logging.getLogger(__name__)
T = TypeVar("T")


class Service:
    """A model being served. Its methods are called from the event loop's thread alone.

    under_way: admitted answers that are not over. draining: whether no more are admitted.
    """

    def __init__(
        self,
        served: Served,
        config: ServerConfig,
        *,
        workers: int = 2,
        images: ImageSource | None = None,
    ) -> None:
        """Start the engine. workers: threads that open images and make prompts of them. images:
        instead of those that `config` allows."""
        self.served: Served = served
        self.policy: ExitPolicy = served.policy
        self.room: int = config.queue + served.places
        self.outbox: Outbox = Outbox()
        self.engine: Engine = served.start(self.room + 64, self.outbox.flush)
        self.prompter: Prompter = Prompter(served, config)
        config = _with_calibrated_length(config, served.calibrated)
        self.config: ServerConfig = config
        self.images: ImageSource = images or ImageSource.of(config.images, served.smallest)
        self.tokenizer: Any = served.tokenizer
        self.metrics: Metrics = Metrics(config.name)
        self.alarm: Alarm = Alarm(served.likeness)
        self.watcher: Any = served.watcher(self.engine, self.alarm)
        self._add_gauges()
        self.under_way: int = 0
        self.draining: bool = False
        self.started: int = int(time.time())
        self._typical = 1.0  # seconds of an answer, lately
        self._handles: set[Handle] = set()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="offramp-input")
        self._texts = ThreadPoolExecutor(1, thread_name_prefix="offramp-text")
        # Their own: a host that is slow to answer does not delay images from elsewhere.
        self._fetchers = ThreadPoolExecutor(16, thread_name_prefix="offramp-fetch")

    # -- who is let in -----------------------------------------------------------------------------

    def admit(self, answers: int) -> Place:
        """Reserve room for so many answers.

        Raises:
            ApiError: there is none (429), too many at once (400), the server is stopping (503).
        """
        if self.draining:
            raise ApiError(
                503, "The server is stopping.", code="stopping", headers={"Retry-After": "5"}
            )
        if answers > min(self.config.choices, self.room):
            most = min(self.config.choices, self.room)
            raise ApiError(
                400,
                f"{answers} answers at once are more than the {most} allowed.",
                param="n",
                code="too_many_choices",
            )
        if self.under_way + answers > self.room:
            rounds = self.under_way / self.engine.core.config.slots
            wait = min(60, max(1, math.ceil(rounds * self._typical)))
            raise ApiError(
                429,
                f"The server is busy: {self.under_way} answers are under way or waiting.",
                code="queue_full",
                headers={"Retry-After": str(wait)},
            )
        self.under_way += answers
        return Place(self, answers)

    # -- what a request becomes --------------------------------------------------------------------

    async def prepare(
        self, urls: Sequence[str], make: Callable[[Sequence[Any]], Inputs]
    ) -> tuple[Inputs, Sequence[Any]]:
        """Return a prompt's inputs and its images, opened and processed in worker threads.

        When cancelled, fetches end, and of the images only the current one is still opened.
        """
        loop = asyncio.get_running_loop()
        unwanted = threading.Event()
        far = [url for url in dict.fromkeys(urls) if is_far(url)]

        def fetch(url: str) -> bytes:
            return self.images.encoded(url, unwanted)

        def work() -> tuple[Inputs, Sequence[Any]]:
            images = []
            for url in urls:
                if unwanted.is_set():
                    raise CancelledError
                file = fetched[url] if url in fetched else self.images.encoded(url)
                images.append(self.images.decode(file))
            return make(images), images

        try:
            files = await asyncio.gather(
                *(loop.run_in_executor(self._fetchers, fetch, url) for url in far)
            )
            fetched = dict(zip(far, files, strict=True))
            return await loop.run_in_executor(self._pool, work)
        finally:
            unwanted.set()

    async def constraint(self, request: Sampling) -> Any:
        """Return the constraint of the answers to a request. Made in a thread, because a large
        schema takes long; the thread is freed when the call is cancelled.

        Raises:
            ApiError: a schema that is not supported, or too long, or a tokenizer without support.
        """
        schema = request.schema_of_answer
        if schema is None:
            return None
        try:
            size = len(json.dumps(schema))
        except RecursionError:
            size = self.config.body
        if size > self.config.schema:
            raise ApiError(
                400,
                f"The JSON schema is longer than the {self.config.schema} characters allowed.",
                param="response_format",
                code="schema_too_long",
            )
        unwanted = threading.Event()
        try:
            return await self.of_text(lambda: self.served.constraint(schema, unwanted))
        except OfframpError as error:
            said = f"{error.problem} {error.remedy}"
            raise ApiError(400, said, param="response_format", code="invalid_value") from error
        finally:
            unwanted.set()

    async def of_text(self, work: Callable[[], T]) -> T:
        """Return the result of `work` on a text, in a thread that no prompt waits for."""
        return await asyncio.get_running_loop().run_in_executor(self._texts, work)

    async def question(self, request: Sampling, use: Use) -> str:
        """Return a request's question about one image, for an early answer; see
        `Prompter.question`. Made once a request, in the threads for prompts, because templates may
        be slow."""
        if use.named != "early_exit":
            return OTHER
        ask = self.prompter.question
        return await asyncio.get_running_loop().run_in_executor(self._pool, ask, request)

    def use_of(self, request: Sampling) -> Use:
        """Return how the answers to a request use the exits."""
        asked = request.offramp
        mode = (asked and asked.mode) or self.config.mode
        thresholds = asked.thresholds if asked else None
        if thresholds is not None:
            return Use("early_exit", thresholds, "early_exit")
        if asked and asked.trust is not None:
            if self.policy.trust is None:
                said = "These exits take nothing by trust: offramp.thresholds are for them."
                raise ApiError(400, said, param="offramp", code="invalid_value")
            return Use("early_exit", None, "early_exit", point={0: asked.trust}, trust=asked.trust)
        replaced = None if self.watcher is None else self.watcher.replaces
        if replaced is not None and self._own(mode):
            return Use(replaced, None, replaced, fell_back=True)
        if mode is None:
            own = self.policy.own_mode
            plain = own == "lossless" and not self.served.drafts
            return Use(None, None, "full" if plain else own)
        return Use(mode, None, mode)

    def of_kind(self, use: Use, asked: str) -> Use:
        """Return the use of exits at the point of the question's kind, unless the request named
        thresholds or a trust."""
        if use.named != "early_exit" or not use.own:
            return use
        return replace(use, point=self.served.point_of(asked))

    @property
    def answers_unlike(self) -> bool:
        """Return True if requests unlike the calibrated ones are answered losslessly."""
        return self.config.unlike == "lossless"

    async def look(self, use: Use, images: Sequence[Any]) -> Any:
        """Return the look of an early answer's one image; None where looks are not compared. Made
        in the threads for images, which may be large."""
        compared = (
            self.served.likeness.looks_at_images and use.named == "early_exit" and len(images) == 1
        )
        if not compared:
            return None
        return await asyncio.get_running_loop().run_in_executor(self._pool, look_of, images[0])

    def verdict(
        self, status: Status, asked: str, use: Use, done: Completion, look: Any, client: str
    ) -> Verdict:
        """Return what is promised of an answer to a question about one image, and note whether the
        request is unlike the calibrated ones. status: of the question's early answers."""
        exact = use.named != "early_exit" or not done.early_exit
        watched = self.watcher is not None and use.own
        found = decide(
            status,
            exact=exact,
            broken=use.fell_back if exact else watched and self.watcher.broken,
            kind=self.served.kind_of(asked),
            likeness=self.served.likeness,
            scores=[token.score for token in done.tokens],
            look=look,
        )
        if found.p_value is not None and self._noted(found.p_value, client):
            log.warning(
                json.dumps(
                    {
                        "event": "unlike_calibrated",
                        "unlike": self.alarm.unlike,
                        "compared": self.alarm.compared,
                    }
                )
            )
        return found

    def _noted(self, p_value: float, client: str) -> bool:
        """Note a request; whether the alarm is raised by it."""
        before = self.alarm.raised
        self.alarm.add(p_value, client)
        return self.alarm.raised and not before

    def _own(self, mode: str | None) -> bool:
        """Whether a request that names `mode` gets the policy that was calibrated."""
        return self.policy.own_mode == "early_exit" and mode in (None, "early_exit")

    def watches(self, request: Sampling, use: Use, images: Sequence[Any], client: str = "") -> bool:
        """Return True if the answer to a request will be compared with the full model's."""
        own = use.named == "early_exit" and use.own
        if self.watcher is None or not own or request.n != 1 or len(images) != 1:
            return False
        return bool(self.watcher.draws(client, images[0]))

    def submit(self, inputs: Inputs, use: Use, **more: Any) -> Handle:
        """Hand a prompt to the engine. more: as of `BatchEngine.submit`."""
        handle = self.engine.submit(
            inputs, mode=use.mode, thresholds=use.thresholds, point=use.point, **more
        )
        self._handles.add(handle)
        return handle

    def over(self, handle: Handle) -> None:
        """Note that a request was answered, or its client left."""
        self._handles.discard(handle)
        if not handle.done():
            self.engine.cancel(handle)
        elif not handle.cancelled() and handle.exception() is None:
            self._typical += 0.1 * (handle.result().total - self._typical)

    # -- the end -----------------------------------------------------------------------------------

    def abort(self) -> None:
        """End all requests, with an error to clients that the server is stopping."""
        for handle in list(self._handles):
            self.engine.cancel(handle)

    def close(self) -> None:
        """Stop the engine and drop current requests."""
        self.draining = True
        if self.watcher is not None:
            self.watcher.close()
        self.engine.close(drain=False)
        for pool in (self._pool, self._fetchers, self._texts):
            pool.shutdown(wait=False, cancel_futures=True)

    # -- numbers -----------------------------------------------------------------------------------

    def _add_gauges(self) -> None:
        engine, gauge = self.engine, self.metrics.gauge
        gauge("num_requests_running", "Requests in slots.", lambda: engine.running)
        gauge("num_requests_waiting", "Requests without a slot.", self._without_slot)
        gauge(
            "kv_cache_usage_perc",
            "Share of the slots' columns in use, 0 to 1.",
            lambda: engine.core.cache_use,
        )
        for more in self.served.gauges():
            gauge(*more)
        tally = engine.core.tally

        gauge(
            "exit_rate",
            "Share of early exit's tokens that the first exit wrote.",
            lambda: _share(tally.exited, tally.exited + tally.waited),
        )
        gauge(
            "draft_acceptance_rate",
            "Share of lossless drafts that were right.",
            lambda: _share(tally.accepted, tally.drafted),
        )
        if self.served.likeness.kinds:
            gauge(
                "likeness_compared",
                "Answers held to the calibrated ones.",
                lambda: self.alarm.compared,
            )
            gauge(
                "unlike_requests",
                "Of these, requests unlike the calibrated ones.",
                lambda: self.alarm.unlike,
            )
            gauge(
                "likeness_alarm",
                "1 where more are unlike than by chance.",
                lambda: self.alarm.raised,
            )
        if self.watcher is not None:
            self._add_risk(self.watcher)

    def _add_risk(self, watcher: Any) -> None:
        gauge = self.metrics.gauge
        promise, seen = self.served.stands().promise, watcher.promise
        broken = "1 where the guarantee is broken."
        if promise is not None and seen is not None and promise.risk != seen.risk:
            broken = (
                f"1 where answers differ more than the calibrated ones did. The guarantee is of "
                f"{promise.risk}, which requests do not show"
                + (": people's answers do." if watcher.judged is not None else ".")
            )
        if watcher.judged is not None:
            gauge("judged_answers", "Answers that people judged.", lambda: watcher.judged.n)
        gauge("watched_images", "Images whose answers were compared.", lambda: watcher.risk.n)
        gauge("watched_unlike", "Besides, unlike those calibrated.", lambda: watcher.others.n)
        gauge("watched_let_go", "Watched requests that were not compared.", lambda: watcher.let_go)
        gauge("live_risk", "Mean loss of the answers compared.", lambda: watcher.risk.mean or 0.0)
        gauge(
            "live_risk_lower", "The risk is above, at all times.", lambda: watcher.risk.interval[0]
        )
        gauge(
            "live_risk_upper", "The risk is below, at all times.", lambda: watcher.risk.interval[1]
        )
        gauge("guarantee_broken", broken, lambda: watcher.broken)
        gauge(
            "watched_coverage",
            "Share of the watched requests that were compared, lately.",
            lambda: math.nan if watcher.coverage is None else watcher.coverage,
        )
        if watcher.promise is not None:
            promised = watcher.promise.target
            gauge("risk_target", "The risk that is guaranteed.", lambda: promised)

    def _without_slot(self) -> int:
        """Answers that were let in and have no slot yet."""
        return max(0, self.under_way - self.engine.running)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _with_calibrated_length(config: ServerConfig, longest: int | None) -> ServerConfig:
    """Requests that name no longest answer get the calibrated one, where the operator names none:
    of longer answers nothing is guaranteed."""
    if not longest or config.default_tokens != ServerConfig.default_tokens:
        return config
    return replace(config, default_tokens=longest)
