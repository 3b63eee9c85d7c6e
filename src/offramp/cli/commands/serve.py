"""`offramp serve`: OpenAI's API, and a page to look at."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from offramp.cli.loading import check_engine, check_name, loaded
from offramp.cli.options import (
    NAMED_EXITS,
    add_command,
    engine_option,
    field_options,
    filled,
    name_first,
    precision_options,
    runtime_options,
    settings_option,
    vision_options,
    writes_many,
)
from offramp.cli.output import print_json, tell
from offramp.cli.parser import Parser, or_none, threads, whole
from offramp.core.errors import InputError, StorageError
from offramp.engines import AUTO, engine_named

SLOTS = 8
PORT = 8000
IMAGES_KEPT, PROMPTS_KEPT = 2**28, 4
"""Bytes of image features, and prompts whose keys and values are kept for the next turn."""
log = logging.getLogger(__name__)


def add(commands: Any) -> None:
    add_command(
        commands,
        "serve",
        "Serve a model with its exits: OpenAI's API, metrics, and a page to look at.",
        "offramp serve tiny-opt\n  offramp serve photo",
        _serve,
        _options,
        usual="host port mode slots engine gguf quantize vision served-name api-keys",
    )


def _options(parser: Parser) -> None:
    from offramp.serving.monitor.watch_config import WatchConfig

    model = parser.add_argument_group("model")
    name_first(parser, model, "name", ("--adapter",), NAMED_EXITS)
    model.add_argument(
        "--backbone", metavar="NAME", help="hub name or folder of the VLM (default: the adapter's)"
    )
    precision_options(model)
    model.add_argument(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="Jinja template that writes conversations (default: the processor's, if it has one)",
    )
    model.add_argument(
        "--threads",
        type=or_none(threads),
        metavar="N",
        help="CPU threads for one call (default: PyTorch's own choice)",
    )
    _engine_options(parser)
    server_options(parser)
    settings_option(
        parser.add_argument_group("watched guarantee"),
        "--watch",
        WatchConfig,
        ("share", "level", "slack", "action", "keep", "deadline", "state", "frequencies"),
        "how the guarantee is watched, as 0.05,action=warn, where a number alone is the share",
        first="share",
    )
    images = parser.add_argument_group("images")
    vision_options(images)
    image_options(images)


def server_options(parser: Parser) -> None:
    """Add the options of servers with or without PyTorch."""
    from offramp.serving.server.config import KEYS, ServerConfig

    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address (default: 127.0.0.1)")
    group.add_argument(
        "--port",
        type=whole(0),
        default=PORT,
        metavar="N",
        help=f"port (default: {PORT}; 0: one that is free)",
    )
    group.add_argument(
        "--served-name",
        metavar="TEXT",
        help="the model's name in requests (default: that of its folder)",
    )
    group.add_argument(
        "--api-keys",
        type=Path,
        metavar="FILE",
        help=f"file of keys, one a line; # starts a comment; or the variable {KEYS}, "
        "separated by commas (default: no key is needed)",
    )
    field_options(group, ServerConfig, ("seconds", "drain_seconds", "cors"))
    group.add_argument(
        "--allowed-hosts",
        nargs="+",
        metavar="HOST",
        help="names that the server may be asked for under; .example.org: all below it too, '*': "
        "any (default: this machine's and --host; with keys any)",
    )


def image_options(group: Any) -> None:
    """Add the options of which images requests may bring."""
    from offramp.serving.server.config import ImageLimits

    field_options(group, ImageLimits, ("domains", "folder"))
    settings_option(
        group,
        "--image-limits",
        ImageLimits,
        ("count", "bytes", "pixels"),
        "what a request may bring, as count=2",
    )


def _engine_options(parser: Parser) -> None:
    from offramp.serving.server.config import ServerConfig

    engine = parser.add_argument_group("engine")
    field_options(engine, ServerConfig, ("queue", "mode", "unlike"))
    engine.add_argument(
        "--slots",
        type=whole(1),
        metavar="N",
        help=f"answers written at once; 1: one after the other, as `offramp generate` does, for "
        f"models that slots refuse (default: {SLOTS}; 4 in llama.cpp, 1 where "
        "the engine has no more)",
    )
    engine.add_argument(
        "--limit",
        type=whole(1),
        default=1024,
        metavar="N",
        help="tokens of a prompt and its answer (default: 1024)",
    )
    engine_option(parser.add_argument_group("decoder"), auto=True)
    runtime_options(parser, sized=False)


def _serve(arguments: argparse.Namespace) -> None:
    own = None if arguments.engine == AUTO else engine_named(arguments.engine).serves
    if own is not None:
        own(arguments)
        return
    serve_until_stopped(arguments, _config(arguments), _service)


def serve_until_stopped(
    arguments: argparse.Namespace, config: Any, start: Callable[[argparse.Namespace, Any], Any]
) -> None:
    """Serve the service that `start` makes from the arguments and the configuration."""
    from offramp.serving.server.app import create_app
    from offramp.serving.server.run import listen, serve

    place = listen(arguments.host, arguments.port)
    service = start(arguments, config)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)

    def ready(address: str) -> None:
        if arguments.json:
            print_json({"model": config.name, "url": address})
        tell(f"offramp serves {config.name}: {address} (a page), {address}/v1 (OpenAI's API)")

    serve(create_app(service), service, place, ready=ready)


def _config(arguments: argparse.Namespace) -> Any:
    """The server's configuration; mistakes in it are reported before a model is loaded."""
    from offramp.serving.monitor.watch_config import WatchConfig

    check_engine(arguments)
    if arguments.watch.get("share") != 0:
        WatchConfig(**arguments.watch)
    if arguments.engine != AUTO:
        _slots(arguments.engine, arguments.slots)
    config = server_config(arguments)
    check_name(arguments.name, exits=True)
    return config


def server_config(arguments: argparse.Namespace) -> Any:
    """Return the server's settings from the options of `server_options` and `image_options`."""
    from offramp.serving.server.config import ImageLimits, ServerConfig

    if arguments.port > 65535:
        raise InputError(f"There is no port {arguments.port}.", "Give a number up to 65535.")
    name = arguments.served_name or Path(arguments.name).resolve().name or arguments.name
    keys = tuple(_keys(arguments.api_keys))
    if not keys and not _is_local(arguments.host):
        log.warning(
            "Without keys everybody who reaches %s may ask this server. Give --api-keys FILE, or "
            "leave --host out.",
            arguments.host,
        )
    images = ImageLimits(**filled(arguments, ImageLimits), **arguments.image_limits)
    body = max(32 * 2**20, 2 * images.bytes * images.count)
    return ServerConfig(
        **filled(arguments, ServerConfig)
        | {
            "name": name,
            "keys": keys,
            "hosts": _hosts(arguments, keyed=bool(keys)),
            "images": images,
            "body": body,
            "bodies": max(2**30, 4 * body),
        }
    )


def _is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def _hosts(arguments: argparse.Namespace, *, keyed: bool) -> tuple[str, ...]:
    """Names that the server may be asked for under; none: any, as keys keep others out."""
    from offramp.serving.server.middleware import LOCAL, host_name

    if arguments.allowed_hosts is None:
        own = (arguments.host, socket.gethostname(), socket.getfqdn())
        return () if keyed else (*LOCAL, *(name.lower().rstrip(".") for name in own))
    wrong = [
        name
        for name in arguments.allowed_hosts
        if name != "*" and host_name(f"[{name}]" if ":" in name else name.lstrip(".")) is None
    ]
    if wrong:
        raise InputError(
            f"{wrong[0]!r} is not the name of a host.",
            "Name hosts without a port: example.org, .example.org, 192.0.2.1 or '*'.",
        )
    return (*LOCAL, *arguments.allowed_hosts)


def _slots(engine: str, asked: int | None) -> int:
    """Return how many answers an engine writes at once.

    Raises:
        InputError: more are asked for than the engine writes.
    """
    one = engine_named(engine)
    usual = SLOTS if writes_many(engine, one) else one.together
    if usual == 1 and (asked or 1) > 1:
        raise InputError(
            f"--engine {engine} writes one answer at a time, and --slots {asked} asks for more.",
            "Leave --slots out; others wait in the queue (--queue).",
        )
    return asked or usual


def _keys(file: Path | None) -> list[str]:
    """The keys of a file, or of the environment.

    Raises:
        InputError: the file holds none, nor does the variable, which is set. StorageError: the file
            cannot be read.
    """
    from offramp.serving.server.config import keys_of_environment
    from offramp.serving.server.middleware import keys_of

    if file is None:
        return list(keys_of_environment())
    try:
        keys = keys_of(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise StorageError(
            f"The keys in {file} cannot be read: {said}.",
            "Name a text file in UTF-8 with a key a line.",
        ) from error
    if not keys:
        raise InputError(f"{file} holds no key.", "Write a key a line.")
    return list(keys)


def _service(arguments: argparse.Namespace, config: Any) -> Any:
    """The model, loaded and running."""
    import torch

    from offramp.features.prefix_cache import PrefixCache
    from offramp.features.vision_cache import VisionCache
    from offramp.serving.engine_config import EngineConfig
    from offramp.serving.server.pytorch import runtime_name, service_of

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    opened = loaded(
        arguments, name=arguments.name, context=arguments.limit, sequences=arguments.slots
    )
    slots = _slots(opened.engine, arguments.slots)
    sizes = EngineConfig(slots=slots, limit=arguments.limit)
    model = opened.adapter if opened.has_exits else opened.adapter.backbone
    serial = opened.runtime or (model if slots == 1 else None)
    watch, loss, judge = _watched(arguments, model, runtime_name(serial))
    kept: dict[str, Any] = {
        "vision_cache": VisionCache(IMAGES_KEPT),
        "prefix_cache": PrefixCache(PROMPTS_KEPT),
    }
    return service_of(
        model,
        opened.processor,
        config,
        sizes,
        watch=watch,
        loss=loss,
        judge=judge,
        serial=serial,
        **kept,
    )


def _watched(
    arguments: argparse.Namespace, model: Any, runtime: str | None
) -> tuple[Any, Any, Any]:
    """How the guarantee is watched, what an answer loses by its risk, and by right answers of
    people, if the risk needs some. runtime: its name."""
    from offramp.adapter.adapter import Adapter
    from offramp.calibration.risk_functions import RISKS
    from offramp.promises.conditions import TORCH
    from offramp.promises.guarantee import watched
    from offramp.serving.monitor.watch_config import WatchConfig
    from offramp.serving.monitor.watcher import differs

    standing = model.standing(engine=runtime) if isinstance(model, Adapter) else None
    promise = None if standing is None else standing.promise
    if standing is not None and standing.why:
        log.warning("%s. See `offramp calibrate`.", standing.sentence.capitalize())
    if arguments.watch.get("share") == 0:
        return None, differs, None
    own = {} if promise is None else {"state": _state_file(model, arguments.port)}
    watch = WatchConfig(**own | arguments.watch)
    if promise is None:
        return watch, differs, None
    seen = watched(model.of_engine(runtime or TORCH).calibration, promise)
    if seen is None:
        log.warning(
            "The guarantee of %r needs right answers, which requests do not bring, and the "
            "calibration does not say how much answers differ: it is not watched.",
            promise.risk,
        )
        return None, differs, None
    risk = RISKS[seen.risk]
    judge = None if seen is promise else _judge(RISKS[promise.risk], watch.frequencies)
    return watch, lambda early, full: float(risk.losses([early], [full], [])[0]), judge


def _judge(risk: Any, frequencies: Path | None) -> Any:
    """What an answer loses by right answers of people; None: words are to be weighed, and no
    captions are there to weigh them by."""
    from offramp.data.datasets import read_examples
    from offramp.inputs.example import Example

    if risk.weighed is not None:
        if frequencies is None:
            return None
        risk = risk.weighed(read_examples(frequencies, require_answers=True))

    def judge(early: Any, full: Any, references: Sequence[str]) -> float:
        example = Example(Path("judged"), "", tuple(references), "judged")  # answers count alone
        return float(risk.losses([early], [full], [example])[0])

    return judge


def _state_file(model: Any, port: int) -> Path | None:
    """Of this guarantee of these exits, wherever they lie: made again, it starts anew. A server at
    another port has its own; one at any that is free is known again by nothing, and keeps none."""
    from offramp.common.folders import user_folder
    from offramp.core.storage import digest_rows

    if not port:
        return None
    base = user_folder("XDG_STATE_HOME", ".local/state")
    name = digest_rows([model.backbone.name, dict(model.calibration or {})])[:16]
    place = "" if port == PORT else f"-{port}"
    return base / "offramp" / f"watch-{name}{place}.json"
