"""What the application serves in PyTorch: an adapter, a backbone, or a runtime in its place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from threading import Event
from typing import Any, cast

from offramp.adapter.adapter import Adapter
from offramp.adapter.answers import Model
from offramp.core.decoding.policy import FULL, ExitPolicy
from offramp.core.executors.prefill import check_inputs
from offramp.core.models.backbone import Backbone
from offramp.core.storage import digest_rows
from offramp.features.constraint import JsonConstraint
from offramp.features.input_processor import InputProcessor
from offramp.features.prefix_cache import PrefixCache
from offramp.features.vision_cache import VisionCache
from offramp.promises.conditions import Conditions, of_processor
from offramp.promises.guarantee import SCALES, GuaranteeStatus, risk_words, standing, watched
from offramp.promises.likeness import LIKE, Alarm, Likeness
from offramp.promises.prompt_kinds import FRAMES
from offramp.serving.batch_engine import BatchEngine
from offramp.serving.engine import Engine
from offramp.serving.engine_config import EngineConfig
from offramp.serving.host import BatchRuntime, is_runtime
from offramp.serving.monitor.watch_config import WatchConfig
from offramp.serving.monitor.watcher import Judge, Loss, Watcher, differs
from offramp.serving.serial import SerialCore
from offramp.serving.server.api.options import Generation
from offramp.serving.server.api.protocol import Sampling
from offramp.serving.server.config import ServerConfig
from offramp.serving.server.hf_options import generation
from offramp.serving.server.inputs import schemas
from offramp.serving.server.inputs.images import ImageSource
from offramp.serving.server.served import Inputs
from offramp.serving.server.service import Service


class TorchServed:
    """The `Served` of a model in PyTorch.

    adapter: None: the backbone is served without exits.
    """

    def __init__(
        self,
        model: Adapter | Backbone,
        processor: Any,
        engine: EngineConfig | None = None,
        *,
        watch: WatchConfig | None = None,
        loss: Loss = differs,
        judge: Judge | None = None,
        serial: Model | None = None,
        vision_cache: VisionCache | None = None,
        prefix_cache: PrefixCache | None = None,
        **more: Any,
    ) -> None:
        """watch: how closely the adapter's guarantee is watched; None: not at all. loss: of its
        risk. judge: of a risk that needs right answers; see `Watcher`. serial: what answers
        instead of slots in PyTorch: the adapter itself, one request at a time, or its runtime, in
        as many slots as that has rows. vision_cache, prefix_cache: as of either engine; the former
        is left out where it is not known where the vision tower is. more: as of `BatchEngine`.
        """
        self.adapter: Adapter | None = model if isinstance(model, Adapter) else None
        self.backbone: Backbone = model.backbone if isinstance(model, Adapter) else model
        self.policy: ExitPolicy = FULL if self.adapter is None else self.adapter.policy
        self.layers: int = self.backbone.depth
        self.sees: bool = not self.backbone.text_only
        self._sizes = _within_positions(engine or EngineConfig(), self.backbone)
        self.limit: int = self._sizes.limit
        self._model, self._serial, self._more = model, serial, more
        self._one_by_one = serial is not None and not is_runtime(serial)
        self.places: int = 1 if self._one_by_one else self._sizes.slots
        if self.backbone.family.vision is None:
            vision_cache = None
        self._kept: dict[str, Any] = {"vision_cache": vision_cache, "prefix_cache": prefix_cache}
        self.prompts: InputProcessor = InputProcessor(self.backbone, processor)
        self.smallest: int | None = self.prompts.smallest_side
        # Decodes while another thread encodes, which a fast tokenizer does not like.
        self.tokenizer: Any = copy.deepcopy(self.prompts.tokenizer)
        self._ends = end_tokens(self.backbone.model, self.prompts.eos)
        self._runtime = runtime_name(serial)
        self.likeness: Likeness = Likeness({}) if self.adapter is None else self.adapter.likeness
        self._watch, self._loss, self._judge = watch, loss, judge

    @property
    def name(self) -> str:
        return self.backbone.name

    @property
    def drafts(self) -> bool:
        own = bool(self.policy.drafts or self.policy.thresholds)
        return own or (self.adapter is not None and self.adapter.exits.draft_on)

    @property
    def calibrated(self) -> int | None:
        calibration = None if self.adapter is None else self.adapter.calibration
        return Conditions.of_calibration(calibration).get("longest")

    def ends(self, token: int) -> bool:
        return token in self._ends

    def start(self, queue: int, on_round: Callable[[], None]) -> BatchEngine:
        """Start the engine. Raise `InputError` for slots that memory does not hold, or a policy
        that cannot be batched."""
        more = {"queue": queue, "workers": 1, "on_round": on_round, **self._more}
        if self._one_by_one:
            model = cast(Model, self._serial)
            core = SerialCore(model, self.policy, limit=self.limit, **self._kept)
            return BatchEngine(core, **more)
        writer = self._model if self._serial is None else cast(BatchRuntime, self._serial)
        return BatchEngine(writer, None, self._sizes, **self._kept, **more)

    # -- requests ----------------------------------------------------------------------------------

    def check(self, inputs: Inputs) -> None:
        check_inputs(inputs, self.backbone.model)

    def tokens(self, inputs: Inputs) -> int:
        return int(inputs["input_ids"].shape[-1])

    def room(self, tokens: int) -> int:
        if not self.backbone.is_encoder_decoder:
            return self.limit - tokens
        return self.limit - 1 if tokens <= self.limit else 0

    def generation(self, request: Sampling, config: ServerConfig, **of: Any) -> Generation:
        return generation(request, self.backbone.model, self.tokenizer, config, **of)

    def constraint(self, schema: Mapping[str, Any], unwanted: Event) -> JsonConstraint:
        schemas.check_cost(schema, unwanted)
        return JsonConstraint(schema, self.tokenizer)

    # -- what is guaranteed ------------------------------------------------------------------------

    def stands(
        self,
        *,
        asked: str | None = None,
        longest: int | None = None,
        plain: bool | None = None,
        thresholds: Mapping[int, float] | None = None,
    ) -> GuaranteeStatus:
        if self.adapter is None:
            return GuaranteeStatus()
        kind = "" if asked is None else self.kind_of(asked)
        own = self.adapter.policy
        if thresholds is not None:
            policy = own.at(thresholds)
        else:
            policy = own.moved(None if asked is None else self.point_of(asked))
        here = Conditions.of(
            self.backbone,
            policy,
            engine=self._runtime,
            exits=self.adapter.exits,
            sampling={None: None, True: "greedy", False: "sampled or ruled by the request"}[plain],
            longest=longest,
            prompts=None if asked is None else [[asked]],
            **of_processor(self.prompts.processor),
        )
        return standing(self.adapter.calibration, here, kind)

    def kind_of(self, asked: str) -> str:
        return "" if self.adapter is None else self.adapter.kind_of(asked)

    def point_of(self, asked: str) -> Mapping[int, float] | None:
        return None if self.adapter is None else self.adapter.point_of(asked)

    def promised(self) -> dict[str, Any] | None:
        """Return the main fields of the calibration, with its prompts and the length of its
        answers; None without one."""
        promise = self.stands().promise
        if promise is None or self.adapter is None:
            return None
        about = Conditions.of_calibration(self.adapter.calibration)
        return {
            **asdict(promise),
            "told": promise.told,
            "words": risk_words(promise.risk, promise.unit),
            "scale": SCALES.get(promise.risk, 1),
            "where": LIKE,
            "max_tokens": about["longest"],
            "path": [*_shared(self.adapter.calibration)],
            "prompts": (about.get("prompts") or [])[:FRAMES],
        }

    def watcher(self, engine: Engine, alarm: Alarm) -> Watcher | None:
        if self._watch is None or self.adapter is None:
            return None
        about, promise = digest_rows([dict(self.adapter.calibration or {})]), self.stands().promise
        seen = None if promise is None else watched(self.adapter.calibration, promise)
        return Watcher(
            cast(BatchEngine, engine),
            self.prompts,
            seen,
            self._watch,
            loss=self._loss,
            kind_of=self.adapter.kind_of,
            about=about,
            alarm=alarm,
            right=promise,
            judge=self._judge,
        )

    def gauges(self) -> Sequence[tuple[str, str, Callable[[], float]]]:
        prefixes, backbone = self._kept["prefix_cache"], self.backbone

        def hits() -> float:
            return float(prefixes.reused / max(1, prefixes.reused + prefixes.run))

        said = "Share of prompt tokens whose keys were kept."
        again = "Answers that the model read again"
        return [
            *([] if prefixes is None else [("prefix_cache_hit_rate", said, hits)]),
            ("answers_read_again", f"{again}.", lambda: backbone.readings.read),
            (
                "answers_not_its_own",
                f"{again}, and that were not its own; it wrote them anew.",
                lambda: backbone.readings.failed,
            ),
        ]


def service_of(
    model: Adapter | Backbone,
    processor: Any,
    config: ServerConfig,
    engine: EngineConfig | None = None,
    *,
    workers: int = 2,
    images: ImageSource | None = None,
    **more: Any,
) -> Service:
    """Start serving a model. workers, images: as of `Service`. more: as of `TorchServed`."""
    return Service(
        TorchServed(model, processor, engine, **more), config, workers=workers, images=images
    )


def _shared(calibration: Mapping[str, Any] | None) -> Iterator[dict[str, float]]:
    """Yield what was found at levels that all exits share: the measured risk, and its bound."""
    for point in (calibration or {}).get("path") or []:
        if len(levels := {*point["thresholds"].values()}) == 1:
            yield {"level": levels.pop(), "risk": point["risk"], "bound": point["bound"]}


def _within_positions(sizes: EngineConfig, backbone: Backbone) -> EngineConfig:
    longest = backbone.positions
    return sizes if longest is None or longest >= sizes.limit else replace(sizes, limit=longest)


def runtime_name(model: Model | None) -> str | None:
    """Return the name of the runtime in the adapter's place; None: PyTorch answers."""
    return None if model is None or isinstance(model, Adapter | Backbone) else model.name


def end_tokens(model: Any, usual: int) -> frozenset[int]:
    """Return the ids that end an answer."""
    named = getattr(model.generation_config, "eos_token_id", None)
    if named is None:
        return frozenset({usual})
    return frozenset(named if isinstance(named, list) else [named])
