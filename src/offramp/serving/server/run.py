"""The server's process: HTTP by uvicorn, and a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from offramp.errors import InputError
from offramp.serving.server.errors import error_object
from offramp.serving.server.service import Service

SWITCH_SECONDS = 0.0005
"""How long Python's threads may keep the engine's waiting for their common lock."""
HEADER_BYTES = 32 * 1024
"""Of a request's first line and header together."""


def protocol(header_seconds: float) -> type[H11Protocol]:
    """HTTP/1.1 that refuses with error objects, and waits so long for a header."""

    class Protocol(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._waits = self.loop.call_later(header_seconds, self._no_header)

        def connection_lost(self, exc: Exception | None) -> None:
            self._waits.cancel()
            super().connection_lost(exc)

        def _no_header(self) -> None:
            if self.cycle is None and self.conn.our_state is h11.IDLE:
                self._refuse(408, "The request took too long to come.", "timeout")

        def send_400_response(self, msg: str) -> None:
            self._refuse(400, f"{msg} A header may have {HEADER_BYTES} bytes.", "invalid_http")

        def _refuse(self, status: int, message: str, code: str) -> None:
            body = json.dumps(error_object(status, message, code=code)).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            with contextlib.suppress(h11.LocalProtocolError):  # an answer was begun already
                response = h11.Response(status_code=status, headers=headers, reason=b"")
                for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                    self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

    return Protocol


class Server(uvicorn.Server):
    """On a signal to stop it finishes answers under way, and ends as a command that worked."""

    def __init__(
        self, config: uvicorn.Config, service: Service, ready: Callable[[], None] | None = None
    ) -> None:
        super().__init__(config)
        self._service, self._ready = service, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._ready is not None:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.stop_admitting()
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[Any] | None = None) -> None:
        """Answers that take longer than the drain end with an error object, not in the middle."""
        self._service.stop_admitting()
        seconds = self._service.config.drain_seconds
        timer = asyncio.get_running_loop().call_later(seconds, self._service.abort)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def listen(host: str, port: int) -> socket.socket:
    """The server's socket; nobody can connect before `serve` takes it.

    Raises:
        InputError: the address cannot be had.
    """
    try:
        [family, kind, proto, _, address] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"The server cannot listen on {host}:{port}: {getattr(error, 'strerror', error)}.",
            "Free the port, or name another one: --port.",
        ) from error
    listener.set_inheritable(False)
    return listener


def http(app: FastAPI, service: Service) -> uvicorn.Config:
    """How HTTP is spoken for a service."""
    return uvicorn.Config(
        app,
        http=protocol(service.config.body_seconds),
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(service.config.drain_seconds) + 5,
        backlog=1024,
    )


def serve(
    app: FastAPI, service: Service, place: socket.socket, *, ready: Callable[[str], None]
) -> None:
    """Serve until SIGTERM or Ctrl-C. place: from `listen`. ready: called with the address."""
    host, port = place.getsockname()[:2]
    shown = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, host)
    address = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"
    server = Server(http(app, service), service, lambda: ready(address))
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        with asyncio.Runner(loop_factory=_event_loop()) as runner:
            runner.run(server.serve([place]))
    finally:
        sys.setswitchinterval(before)


def _event_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, where it is installed."""
    try:
        from uvloop import new_event_loop
    except ImportError:  # as on Windows
        return None
    return new_event_loop
