"""The server on many machines, by Ray; needs the extra `ray`.

    from ray import serve
    from offramp.serving.ray_deployment import RayConfig, deployment

    serve.run(deployment(RayConfig("this/folder", max_replicas=8)))

A replica is a process with an engine of its own, behind Ray's proxy; the routes are those of
`offramp serve`. Replicas are added while more requests are under way than they have slots. Other
adapters of the same backbone share its weights: `RayConfig(..., others={"name": "that/folder"})`.
`Captioner` answers millions of images offline, as a class for `ray.data.Dataset.map_batches`.
"""

from __future__ import annotations

import asyncio
import io
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from offramp.adapter import Adapter
from offramp.data.image import open_rgb
from offramp.errors import InputError, OfframpError, check_known
from offramp.loading import open_model
from offramp.models.backbone import Backbone
from offramp.models.input_processor import InputProcessor
from offramp.save_and_load import fetched
from offramp.serving.batch_engine import BatchEngine
from offramp.serving.engine_config import EngineConfig

if TYPE_CHECKING:
    from fastapi import FastAPI

    from offramp.serving.server.models import Models
    from offramp.serving.server.service import Service


@dataclass(frozen=True)
class RayConfig:
    """Settings of what every replica serves, and how many there are.

    adapter: as `offramp serve` takes it; every machine must have it, or reach the hub. others:
    adapters of the same backbone by the name that a request's `model` gives; a replica holds the
    `held` that were asked for last, each with slots of its own. server: fields of `ServerConfig`
    beside the name; keys of requests are those of the variable OFFRAMP_API_KEYS, where it is set.
    loading: as of `open_model`. cpus, gpus: of a replica. threads: of the processor, for one call.
    watch: whether the guarantee is watched; each replica watches its own requests, and all that
    there may be share the level. scaling: more fields of Ray's autoscaling, such as
    upscale_delay_s.

    Raises:
        InputError: no replicas, or fewer at most than at least; two adapters of one name.
    """

    adapter: str
    name: str | None = None
    others: Mapping[str, str] = field(default_factory=dict)
    held: int = 4
    slots: int = 8
    limit: int = 1024
    queue: int = 64
    min_replicas: int = 1
    max_replicas: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    threads: int | None = None
    watch: bool = True
    scaling: Mapping[str, Any] = field(default_factory=dict)
    server: Mapping[str, Any] = field(default_factory=dict)
    loading: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise InputError(
                f"From {self.min_replicas} to {self.max_replicas} replicas are none.",
                "Give whole numbers from 1, the larger one last.",
            )
        if self.served in self.others or self.held < 1:
            raise InputError(
                f"Adapters {[self.served, *self.others]} cannot be served, {self.held} at once.",
                "Give each a name of its own, and hold one or more.",
            )

    @property
    def served(self) -> str:
        """The first adapter's name in requests."""
        return self.name or Path(self.adapter).name


def replica_app(config: RayConfig) -> FastAPI:
    """The application of one replica; built in its process, as it holds the model."""
    import torch

    from offramp.serving.monitor.watch_config import WatchConfig
    from offramp.serving.server.app import create_app
    from offramp.serving.server.config import ServerConfig, keys_of_environment
    from offramp.serving.server.pytorch import service_of
    from offramp.serving.server.tracing import provider_of

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model, processor = open_model(config.adapter, **config.loading)
    sizes = EngineConfig(config.slots, config.limit)

    def start(name: str, model: Adapter | Backbone) -> Service:
        named: dict[str, Any] = {"name": name, "queue": config.queue}
        server = ServerConfig(**{"keys": keys_of_environment(), **config.server}, **named)
        watch = WatchConfig(watchers=config.max_replicas) if config.watch else None
        return service_of(model, processor, server, sizes, watch=watch)

    first = start(config.served, model)
    backbone = model.backbone if isinstance(model, Adapter) else model
    served = _multiplexed(config, first, backbone, start) if config.others else first
    return create_app(served, provider_of(os.environ))


def _multiplexed(
    config: RayConfig,
    first: Service,
    backbone: Backbone,
    start: Callable[[str, Adapter], Service],
) -> Models:
    """The models of a replica; Ray counts which ones it holds, and lets the oldest go."""
    from ray import serve

    from offramp.serving.server.models import Models

    def adapter(name: str) -> Adapter:
        return Adapter.from_pretrained(backbone, fetched(config.others[name]))

    for name in config.others:  # one that does not fit is refused now, not when it is asked for
        adapter(name)
    held: dict[str, Service] = {}

    @serve.multiplexed(max_num_models_per_replica=config.held)
    async def load(name: str) -> _Held:
        held[name] = await asyncio.to_thread(lambda: start(name, adapter(name)))
        return _Held(held, name)

    async def service(name: str) -> Service:
        found: _Held = await load(name)
        return found.service

    return Models(first, tuple(config.others), service, held)


class _Held:
    """A service that a replica holds. Ray deletes it, in a thread, where others take its place."""

    def __init__(self, held: dict[str, Service], name: str) -> None:
        self._held, self._name, self.service = held, name, held[name]

    def __del__(self) -> None:
        """Wait for the answers under way, as long as answers may take, and stop the engine."""
        end = time.monotonic() + self.service.config.seconds
        while self.service.under_way and time.monotonic() < end:
            time.sleep(0.02)
        if self._held.get(self._name) is self.service:
            del self._held[self._name]
            self.service.close()


class Replica:
    """The model that Ray builds the application around."""


def deployment(config: RayConfig) -> Any:
    """An application for `serve.run`.

    A replica takes as many requests as it has slots and places in its queue, and the proxy keeps
    as many again waiting before it refuses; both are Ray's limits beside the server's own.
    """
    from ray import serve

    room = config.slots + config.queue
    drain = float(config.server.get("drain_seconds", 30.0))

    def build() -> FastAPI:
        return replica_app(config)

    deployed = serve.deployment(
        name=f"offramp-{config.served}",
        max_ongoing_requests=room,
        max_queued_requests=room,
        autoscaling_config={
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.slots,
            **config.scaling,
        },
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": config.gpus},
        graceful_shutdown_timeout_s=drain + 5,
        graceful_shutdown_wait_loop_s=0.5,
    )
    return deployed(serve.ingress(build)(Replica)).bind()


def application(arguments: dict[str, Any]) -> Any:
    """The same for a file of Ray Serve's, whose `args` are the fields of `RayConfig`.

    Raises:
        InputError: one of them is none.
    """
    for name in arguments:
        check_known("Argument", [name], [field.name for field in fields(RayConfig)])
    return deployment(RayConfig(**arguments))


class Captioner:
    """Answers one prompt about the images of a batch: a class for `map_batches`.

        dataset.map_batches(
            Captioner, fn_constructor_kwargs={"adapter": "this/folder"}, batch_size=256,
            concurrency=8, num_gpus=1,
        )

    A batch has a column "image" of paths, encoded bytes or arrays [H, W, 3]; the columns "answer",
    "mean_depth" and "error" are added. An image that cannot be read has an error and no answer.

    adapter: as `offramp serve` takes it. options: of generation.
    """

    def __init__(
        self,
        adapter: str,
        *,
        prompt: str = "Caption:",
        column: str = "image",
        slots: int = 8,
        limit: int = 1024,
        mode: str | None = None,
        loading: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        model, processor = open_model(adapter, **(loading or {}))
        backbone = model.backbone if isinstance(model, Adapter) else model
        self._encoder = InputProcessor(backbone, processor)
        self._engine = BatchEngine(model, self._encoder, EngineConfig(slots, limit), queue=1024)
        self._prompt, self._column, self._mode = prompt, column, mode
        self._options = {"max_new_tokens": 64, "do_sample": False, **options}

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        handles = [self._submit(image) for image in batch[self._column]]
        answers, depths, errors = [], [], []
        for handle in handles:
            try:
                if isinstance(handle, OfframpError):
                    raise handle
                output = handle.result().output
                answers.append(self._encoder.texts(output.new_tokens)[0])
                depths.append(output.mean_depth)
                errors.append("")
            except OfframpError as error:
                answers.append("")
                depths.append(float("nan"))
                errors.append(error.problem)
        return {**batch, "answer": answers, "mean_depth": depths, "error": errors}

    def _submit(self, image: Any) -> Any:
        try:
            opened = open_rgb(as_image(image), "An image")
            text = self._encoder.prompt_text(self._prompt)
            inputs = self._encoder.of_text(text, [opened])
            return self._engine.submit(inputs, mode=self._mode, wait=True, **self._options)
        except OfframpError as error:
            return error

    def close(self) -> None:
        self._engine.close()


def as_image(value: Any) -> Any:
    """Return what `open_rgb` opens, of a cell: a path, encoded bytes, or an array [H, W] or [H, W,
    3]."""
    if isinstance(value, str):
        return Path(value)
    if isinstance(value, bytes):
        return io.BytesIO(value)
    if isinstance(value, Image.Image):
        return value
    return Image.fromarray(value)
