"""The engine as a service: requests are admitted, answered and counted."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

from offramp.adapter import Adapter
from offramp.answers import Model
from offramp.engine.constraint import JsonConstraint
from offramp.engine.policy import FULL
from offramp.engine.prefix_cache import PrefixCache
from offramp.errors import OfframpError
from offramp.guarantee import Conditions, Standing, of_processor, standing
from offramp.models.backbone import Backbone
from offramp.models.input_processor import InputProcessor
from offramp.models.vision_cache import VisionCache
from offramp.serving.batch_engine import BatchEngine
from offramp.serving.engine_config import EngineConfig
from offramp.serving.host import Runtime, is_runtime
from offramp.serving.monitor.watch_config import WatchConfig
from offramp.serving.monitor.watcher import Loss, Watcher, differs
from offramp.serving.request import Handle
from offramp.serving.serial import SerialCore
from offramp.serving.server.api.protocol import Sampling
from offramp.serving.server.config import ServerConfig
from offramp.serving.server.errors import ApiError
from offramp.serving.server.inputs.images import ImageSource, is_far
from offramp.serving.server.inputs.prompts import Prompter
from offramp.serving.server.metrics import Metrics
from offramp.serving.server.outbox import Outbox
from offramp.storage import digest_rows


@dataclass(frozen=True)
class Use:
    """How an answer uses the exits: as of `BatchEngine.submit`. named: the mode in words.

    fell_back: the adapter's own thresholds would have been used, were its guarantee not broken.
    """

    mode: str | None
    thresholds: Mapping[int, float] | None
    named: str
    fell_back: bool = False


class Place:
    """Room for some answers, to be given back: of each when the engine is done with it, whether its
    client has read it or not, and of all that are left when nobody waits for them."""

    def __init__(self, service: Service, answers: int) -> None:
        self._service, self._answers = service, answers

    def put_nowait(self, answers: int) -> None:
        """Give room of so many back, as far as it is not back yet; in the event loop's thread."""
        back = min(answers, self._answers)
        self._service.under_way -= back
        self._answers -= back

    def leave(self) -> None:
        """Give all of it back; a second time changes nothing."""
        self.put_nowait(self._answers)


T = TypeVar("T")


class Service:
    """A model being served. Its methods are called from the event loop's thread alone.

    under_way: answers that were let in and are not over. draining: whether no more are let in.
    """

    def __init__(
        self,
        model: Adapter | Backbone,
        processor: Any,
        config: ServerConfig,
        engine: EngineConfig | None = None,
        *,
        workers: int = 2,
        images: ImageSource | None = None,
        watch: WatchConfig | None = None,
        loss: Loss = differs,
        serial: Model | None = None,
        vision_cache: VisionCache | None = None,
        prefix_cache: PrefixCache | None = None,
        **more: Any,
    ) -> None:
        """Start the engine. watch: how closely the adapter's guarantee is watched; None: not at
        all. loss: of its risk. serial: what answers instead of slots in PyTorch: the adapter
        itself, one request at a time, or its runtime, in as many slots as that has rows.
        vision_cache, prefix_cache: as of either engine; the former is left out where it is not
        known where the vision tower is. more: as of `BatchEngine`.

        Raises:
            InputError: slots that memory does not hold; a policy that cannot be batched.
        """
        self.adapter = model if isinstance(model, Adapter) else None
        self.backbone = model.backbone if isinstance(model, Adapter) else model
        self.policy = FULL if self.adapter is None else self.adapter.policy
        self.config = config
        sizes = _within_positions(engine or EngineConfig(), self.backbone)
        self.limit = sizes.limit
        one_by_one = serial is not None and not is_runtime(serial)
        self.room = config.queue + (1 if one_by_one else sizes.slots)
        self.outbox = Outbox()
        if self.backbone.family.vision is None:
            vision_cache = None
        kept: dict[str, Any] = {"vision_cache": vision_cache, "prefix_cache": prefix_cache}
        more = {"queue": self.room + 64, "workers": 1, "on_round": self.outbox.flush, **more}
        if one_by_one:
            core = SerialCore(cast(Model, serial), self.policy, limit=self.limit, **kept)
            self.engine = BatchEngine(core, **more)
        else:
            writer = model if serial is None else cast(Runtime, serial)
            self.engine = BatchEngine(writer, None, sizes, **kept, **more)
        encoder = InputProcessor(self.backbone, processor)
        self.prompter = Prompter(encoder, config)
        self.config = config = _with_calibrated_length(config, self.adapter)
        self.images = images or ImageSource.of(config.images, encoder.smallest_side)
        # Decodes while another thread encodes, which a fast tokenizer does not like.
        self.tokenizer = copy.deepcopy(encoder.tokenizer)
        self.ends = end_tokens(self.backbone.model, encoder.eos)
        self.metrics = Metrics(config.metrics, config.name)
        self._runtime = runtime_name(serial)
        self.standing = self.stands()
        self.watcher: Watcher | None = None
        if watch is not None and self.adapter is not None:
            about = digest_rows([dict(self.adapter.calibration or {})])
            self.watcher = Watcher(
                self.engine, encoder, self.standing.promise, watch, loss=loss, about=about
            )
        self._add_gauges(prefix_cache)
        self.under_way = 0
        self.draining = False
        self.started = int(time.time())
        self._typical = 1.0  # seconds of an answer, lately
        self._handles: set[Handle] = set()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="offramp-input")
        self._texts = ThreadPoolExecutor(1, thread_name_prefix="offramp-text")
        # Their own: a host that is slow to answer does not delay images from elsewhere.
        self._fetchers = ThreadPoolExecutor(16, thread_name_prefix="offramp-fetch")

    # -- who is let in -----------------------------------------------------------------------------

    def admit(self, answers: int) -> Place:
        """Room for so many answers.

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
        self, urls: Sequence[str], make: Callable[[Sequence[Any]], Mapping[str, Any]]
    ) -> tuple[Mapping[str, Any], Sequence[Any]]:
        """A prompt's inputs and its images, opened and processed in worker threads.

        Where it is cancelled, its threads go on with something else: the fetches end, and of the
        images only the current one is opened.
        """
        loop = asyncio.get_running_loop()
        unwanted = threading.Event()
        far = [url for url in dict.fromkeys(urls) if is_far(url)]

        def fetch(url: str) -> bytes:
            return self.images.encoded(url, unwanted)

        def work() -> tuple[Mapping[str, Any], Sequence[Any]]:
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

    async def constraint(self, request: Sampling) -> JsonConstraint | None:
        """Of the answers to a request. Made in a thread: a large schema takes long.

        Raises:
            ApiError: a schema that is not supported, or too long, a tokenizer that cannot write it.
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
        try:
            return await self.of_text(lambda: JsonConstraint(schema, self.tokenizer))
        except OfframpError as error:
            said = f"{error.problem} {error.remedy}"
            raise ApiError(400, said, param="response_format", code="invalid_value") from error

    async def of_text(self, work: Callable[[], T]) -> T:
        """What `work` makes of a text, in a thread that no prompt waits for."""
        return await asyncio.get_running_loop().run_in_executor(self._texts, work)

    def use_of(self, request: Sampling) -> Use:
        """How the answers to a request use the exits."""
        asked = request.offramp
        mode = (asked and asked.mode) or self.config.mode
        thresholds = asked.thresholds if asked else None
        if thresholds is not None:
            return Use("early_exit", thresholds, "early_exit")
        replaced = None if self.watcher is None else self.watcher.replaces
        if replaced is not None and self._own(mode):
            return Use(replaced, None, replaced, fell_back=True)
        if mode is None:
            own, policy = self.policy.own_mode, self.policy
            drafts = bool(policy.drafts or policy.thresholds) or (
                self.adapter is not None and self.adapter.exits.draft_on
            )
            return Use(None, None, "full" if own == "lossless" and not drafts else own)
        return Use(mode, None, mode)

    def stands(
        self,
        *,
        asked: str | None = None,
        longest: int | None = None,
        plain: bool | None = None,
        thresholds: Mapping[int, float] | None = None,
    ) -> Standing:
        """What is guaranteed of early answers; what is not given is not compared.

        asked: the text of a request with one image and one turn, `OTHER` of one with more. longest:
        tokens its answer may have. plain: whether it is decoded greedily, with no rule of its own.
        thresholds: instead of the adapter's.
        """
        if self.adapter is None:
            return Standing()
        own = self.adapter.policy
        policy = own if thresholds is None else own.at(thresholds)
        here = Conditions.of(
            self.backbone,
            policy,
            engine=self._runtime,
            sampling={None: None, True: "greedy", False: "sampled or ruled by the request"}[plain],
            longest=longest,
            prompts=None if asked is None else [[asked]],
            **of_processor(self.prompter.processor.processor),
        )
        return standing(self.adapter.calibration, here)

    def _own(self, mode: str | None) -> bool:
        """Whether a request that names `mode` gets the thresholds that were calibrated."""
        exits = bool(self.policy.thresholds) and not self.policy.lossless
        return exits and mode in (None, "early_exit")

    def watches(self, request: Sampling, use: Use, images: int, client: str = "") -> bool:
        """Whether the answer to a request is to be compared with the full model's."""
        own = use.named == "early_exit" and use.thresholds is None
        watched = own and request.n == 1 and images == 1
        return self.watcher is not None and watched and self.watcher.draws(client)

    def room_behind(self, inputs: Mapping[str, Any]) -> tuple[int, int]:
        """Tokens of a prompt, and of the longest answer that fits behind it."""
        tokens = int(inputs["input_ids"].shape[-1])
        if not self.backbone.is_encoder_decoder:
            return tokens, self.limit - tokens
        return tokens, self.limit - 1 if tokens <= self.limit else 0

    def submit(self, inputs: Mapping[str, Any], use: Use, **more: Any) -> Handle:
        """Hand a prompt to the engine. more: as of `BatchEngine.submit`."""
        handle = self.engine.submit(inputs, mode=use.mode, thresholds=use.thresholds, **more)
        self._handles.add(handle)
        return handle

    def over(self, handle: Handle) -> None:
        """A request is answered, or its client has gone."""
        self._handles.discard(handle)
        if not handle.done():
            self.engine.cancel(handle)
        elif not handle.cancelled() and handle.exception() is None:
            self._typical += 0.1 * (handle.result().total - self._typical)

    # -- the end -----------------------------------------------------------------------------------

    def abort(self) -> None:
        """End all requests; their clients get an error that the server is stopping."""
        for handle in list(self._handles):
            self.engine.cancel(handle)

    def close(self) -> None:
        """Stop the engine; what is under way is dropped."""
        self.draining = True
        if self.watcher is not None:
            self.watcher.close()
        self.engine.close(drain=False)
        for pool in (self._pool, self._fetchers, self._texts):
            pool.shutdown(wait=False, cancel_futures=True)

    # -- numbers -----------------------------------------------------------------------------------

    def _add_gauges(self, prefixes: PrefixCache | None) -> None:
        engine, gauge = self.engine, self.metrics.gauge
        gauge("num_requests_running", "Requests in slots.", lambda: engine.running)
        gauge("num_requests_waiting", "Requests without a slot.", self._without_slot)
        gauge(
            "kv_cache_usage_perc",
            "Share of the slots' columns in use, 0 to 1.",
            lambda: engine.core.cache_use,
        )
        if prefixes is not None:
            gauge(
                "prefix_cache_hit_rate",
                "Share of prompt tokens whose keys were kept.",
                lambda: prefixes.reused / max(1, prefixes.reused + prefixes.run),
            )
        tally = engine.core.tally

        gauge(
            "exit_rate",
            "Share of early exit's tokens that exited.",
            lambda: _share(tally.exited, tally.exited + tally.waited),
        )
        gauge(
            "draft_acceptance_rate",
            "Share of lossless drafts that were right.",
            lambda: _share(tally.accepted, tally.drafted),
        )
        if self.watcher is not None:
            self._add_risk(self.watcher)

    def _add_risk(self, watcher: Watcher) -> None:
        gauge = self.metrics.gauge
        gauge("watched_images", "Images whose answers were compared.", lambda: watcher.risk.n)
        gauge("watched_let_go", "Watched requests that were not compared.", lambda: watcher.let_go)
        gauge("live_risk", "Mean loss of the answers compared.", lambda: watcher.risk.mean or 0.0)
        gauge(
            "live_risk_lower", "The risk is above, at all times.", lambda: watcher.risk.interval[0]
        )
        gauge(
            "live_risk_upper", "The risk is below, at all times.", lambda: watcher.risk.interval[1]
        )
        gauge("guarantee_broken", "1 where the guarantee is broken.", lambda: watcher.broken)
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


def _with_calibrated_length(config: ServerConfig, adapter: Adapter | None) -> ServerConfig:
    """Requests that name no longest answer get the calibrated one, where the operator names none:
    of longer answers nothing is guaranteed."""
    calibration = {} if adapter is None else adapter.calibration or {}
    longest = (calibration.get("conditions") or {}).get("longest")
    if not longest or config.default_tokens != ServerConfig.default_tokens:
        return config
    return replace(config, default_tokens=longest)


def _within_positions(sizes: EngineConfig, backbone: Backbone) -> EngineConfig:
    longest = backbone.positions
    return sizes if longest is None or longest >= sizes.limit else replace(sizes, limit=longest)


def runtime_name(model: Model | None) -> str | None:
    """The name of the runtime that answers in the adapter's place; None: PyTorch does."""
    return None if model is None or isinstance(model, Adapter | Backbone) else model.name


def end_tokens(model: Any, usual: int) -> frozenset[int]:
    """Ids that end an answer."""
    named = getattr(model.generation_config, "eos_token_id", None)
    if named is None:
        return frozenset({usual})
    return frozenset(named if isinstance(named, list) else [named])
