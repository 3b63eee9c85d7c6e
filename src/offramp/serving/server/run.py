"""The server's process: HTTP by uvicorn, and a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
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

from offramp.core.errors import InputError
from offramp.serving.server.config import ServerConfig
from offramp.serving.server.errors import error_object
from offramp.serving.server.service import Service

SWITCH_SECONDS = 0.0005
"""How long Python's threads may keep the engine's waiting for their common lock."""
SEND_BYTES = 256 * 1024
"""That the system keeps for a client which does not read; more would hide that it does not."""
HEADER_BYTES = 32 * 1024
"""Of a request's first line and header together."""


class Protocol(H11Protocol):
    """HTTP/1.1 with error objects for refusals, and time limits for headers and for clients that do
    not read. limits: of connections and of seconds."""

    limits: ServerConfig

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer: asyncio.TimerHandle | None = None
        self._stuck_since: float | None = None
        self._refused = False
        self._watch = self.loop.call_later(self.limits.send_seconds, self._look)
        self._await_header()
        if len(self.connections) > self.limits.connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch.cancel()
        self._header_came()
        super().connection_lost(exc)

    # -- requests that do not come -----------------------------------------------------------------

    @property
    def _asks_nothing(self) -> bool:
        """Whether no request is under way."""
        return self.cycle is None or self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        if self._refused:  # the rest of what was refused
            return
        super().data_received(data)
        if self._asks_nothing:
            self._await_header()
        else:
            self._header_came()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        begun = self.conn.their_state is not h11.IDLE or self.conn.trailing_data[0]
        if self._asks_nothing and begun:  # the rest of this request, or half of the next one
            self._await_header()

    def _await_header(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.limits.body_seconds, self._no_header)
            self._waits_since = self.loop.time()

    def _header_came(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _no_header(self) -> None:
        self._timer = None
        if self._asks_nothing:
            self._refuse(408, "The request took too long to come.", "timeout")

    def _make_room(self) -> None:
        """Close the connection that has asked for nothing for the longest time: this one, where
        all others are being answered."""
        idle = [c for c in self.connections if isinstance(c, Protocol) and c._asks_nothing]
        oldest = min(idle, key=lambda one: one._waits_since)
        said = f"The server has {self.limits.connections} connections already."
        oldest._refuse(503, said, "too_many_connections")

    # -- clients that do not read ------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck_since = self.loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stuck_since = None

    def _look(self) -> None:
        """Give the connection up where what was written, or its end, does not go out."""
        now = self.loop.time()
        if self._stuck_since is not None and now - self._stuck_since >= self.limits.send_seconds:
            self.transport.abort()
            return
        if self.transport.is_closing() and self._stuck_since is None:
            self._stuck_since = now
        self._watch = self.loop.call_later(self.limits.send_seconds / 2, self._look)

    # -- errors ------------------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        large = len(self.conn.trailing_data[0]) > HEADER_BYTES
        said = f"{msg} A header may have {HEADER_BYTES} bytes."
        self._refuse(431 if large else 400, said, "invalid_http", reads_on=True)

    def _refuse(self, status: int, message: str, code: str, *, reads_on: bool = False) -> None:
        """Answer with an error, and close. reads_on: what is on its way is read for a second, as
        closing beside it would take the answer back."""
        self._unset_keepalive_if_required()
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
        self._refused = True
        if reads_on and self.transport.can_write_eof():
            self.transport.write_eof()
            self.loop.call_later(1, self.transport.close)
        else:
            self.transport.close()


def protocol(limits: ServerConfig) -> type[Protocol]:
    """Return the protocol class of a server with these limits."""
    return type("Protocol", (Protocol,), {"limits": limits})


class Server(uvicorn.Server):
    """A server that on a stop signal finishes current answers and exits with success."""

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
        self._service.draining = True
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
        """Stop; answers that take longer than the drain end with an error object."""
        self._service.draining = True
        seconds = self._service.config.drain_seconds
        timer = asyncio.get_running_loop().call_later(seconds, self._service.abort)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def listen(host: str, port: int) -> socket.socket:
    """Return the server's socket, to which nobody can connect before `serve`.

    Raises:
        InputError: the address cannot be had.
    """
    try:
        [family, kind, proto, _, address] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)  # its connections' too
        listener.bind(address)
    except (OSError, UnicodeError) as error:
        elsewhere = (
            not isinstance(error, OSError)
            or isinstance(error, socket.gaierror)
            or error.errno == errno.EADDRNOTAVAIL
        )
        raise InputError(
            f"The server cannot listen on {host}:{port}: {getattr(error, 'strerror', error)}.",
            "Name an address of this machine: --host."
            if elsewhere
            else "Free the port, or name another one: --port.",
        ) from error
    listener.set_inheritable(False)
    return listener


def http(app: FastAPI, service: Service) -> uvicorn.Config:
    """Return uvicorn's settings for a service."""
    return uvicorn.Config(
        app,
        http=protocol(service.config),
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
