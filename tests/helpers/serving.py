"""A server of the shipped model, in the test's own process."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import threading
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

from PIL import Image
from starlette.testclient import TestClient

from offramp.adapter.adapter import Adapter
from offramp.adapter.shipped import load_tiny, tiny_exits
from offramp.core.decoding.scheduler import Schedule
from offramp.data.scenes import tasks
from offramp.serving.engine_config import EngineConfig
from offramp.serving.server.app import create_app
from offramp.serving.server.config import ServerConfig
from offramp.serving.server.pytorch import service_of as service_of_model
from offramp.serving.server.run import Server, http, listen
from offramp.serving.server.service import Service

NAME = "tiny-opt"


@cache
def shipped() -> tuple[Adapter, Any]:
    """The shipped model with its exits, and its processor."""
    backbone, processor = load_tiny("opt", device="cpu")
    return Adapter.from_pretrained(backbone, tiny_exits("opt")), processor


@cache
def scene_examples() -> list[Any]:
    """Captions and questions of the shipped model's world."""
    return [*tasks.captions("test", 6).examples, *tasks.questions("test", 5).examples]


def service_of(slots: int = 8, limit: int = 256, more: Any = None, **config: Any) -> Service:
    adapter, processor = shipped()
    settings = ServerConfig(**{"name": NAME, **config})
    sizes = EngineConfig(slots, limit, schedule=Schedule.of(slots))  # whatever calls take today
    return service_of_model(adapter, processor, settings, sizes, **(more or {}))


def data_uri(image: Image.Image, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


def messages(example: Any, *, image: str | None = None) -> list[dict[str, Any]]:
    """An example as a chat."""
    url = data_uri(example.image) if image is None else image
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": example.prompt},
    ]
    return [{"role": "user", "content": content}]


def asking(served: Service) -> TestClient:
    """A client of the application itself: no socket, no thread of a server; replies come whole."""
    return TestClient(create_app(served), raise_server_exceptions=False)


class _Quiet(Server):
    """In a thread that is not the main one, which alone has signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def running(service: Service) -> Iterator[str]:
    """The server at work; its address."""
    socket = listen("127.0.0.1", 0)
    server = _Quiet(http(create_app(service), service), service)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([socket])), daemon=True)
    thread.start()
    while not server.started and thread.is_alive():  # before that, connections are refused
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
