"""The routes of `offramp serve` from replicas on many machines, by Ray Serve.

pip install 'offramp[serve]' 'ray[serve]>=2.40' on every machine, then in this folder
    serve run ray_serve:application adapter=tiny-opt replicas=8
Keys of requests are those of the variable OFFRAMP_API_KEYS, where it is set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import serve

from offramp import load
from offramp.serving.engine_config import EngineConfig
from offramp.serving.monitor.watch_config import WatchConfig
from offramp.serving.server.app import create_app
from offramp.serving.server.config import ServerConfig, keys_of_environment
from offramp.serving.server.pytorch import service_of

SLOTS, QUEUE = 8, 64


def replica_app(adapter: str, replicas: int) -> Any:
    """The application of one replica; built in its process, as it holds the model. All replicas
    share the level of the watch."""
    opened = load(adapter, engine="torch", vision="torch")
    config = ServerConfig(Path(adapter).name, queue=QUEUE, keys=keys_of_environment())
    watch = WatchConfig(watchers=replicas)
    service = service_of(opened.adapter, opened.processor, config, EngineConfig(SLOTS), watch=watch)
    return create_app(service)


class Replica:
    """The class that Ray builds the application around."""


def application(arguments: dict[str, str]) -> Any:
    """As many replicas as requests fill, up to `replicas`; each on its own graphics card, where
    `gpus` is 1."""
    replicas = int(arguments.get("replicas", 1))
    deployed = serve.deployment(
        max_ongoing_requests=SLOTS + QUEUE,
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": replicas,
            "target_ongoing_requests": SLOTS,
        },
        ray_actor_options={"num_gpus": float(arguments.get("gpus", 0))},
        graceful_shutdown_timeout_s=35,
    )
    build = serve.ingress(lambda: replica_app(arguments["adapter"], replicas))
    return deployed(build(Replica)).bind()
