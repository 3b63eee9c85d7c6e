"""What stands before every route: request ids, keys, limits of a body, a line of log."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from offramp.serving.server.config import MIB, ServerConfig, is_among
from offramp.serving.server.errors import ApiError, api_error, respond

access = logging.getLogger("offramp.serving.access")
OPEN = ("/health", "/ready")
"""What needs no key and is asked for under any name: what a load balancer asks."""
SMALL = {"/detokenize": 2 * MIB}
"""Paths whose bodies are smaller than others'."""
LOCAL = ("localhost", "127.0.0.1", "::1")
"""Names of the machine itself."""
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
"""Of every answer that does not say it itself."""
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Gate:
    """An ASGI middleware that checks hosts, keys and sizes. refused: called with the status of
    every error.

    A route may put entries for the log line into `scope["offramp"]`, and finds the number of the
    client's key in `scope["offramp_key"]`; None: no key is needed.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig, refused: Callable[[int], None]) -> None:
        self._app, self._config, self._refused = app, config, refused
        self._keys = [key.encode() for key in config.keys]
        self._held = 0  # bytes of the bodies of all requests under way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        asked = headers.get("x-request-id", "")
        name = asked if _ID.fullmatch(asked) else uuid.uuid4().hex
        scope["offramp"] = {}
        begun, status = time.monotonic(), 499  # nothing was sent: the client had gone

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                sent = MutableHeaders(scope=message)
                sent["x-request-id"] = name
                for header, value in HEADERS.items():
                    sent.setdefault(header, value)
            await send(message)

        try:
            await self._checked(scope, headers, receive, answer)
        except ApiError as error:
            await respond(error)(scope, receive, answer)
        except Exception as error:  # of a route, and nothing was sent yet
            if status != 499:
                raise
            await respond(api_error(error))(scope, receive, answer)
        finally:
            if status >= 400:
                self._refused(status)
            self._log(scope, name, status, time.monotonic() - begun)

    async def _checked(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        self._check_host(scope, headers)
        known = scope["offramp_key"] = self._known(headers) if self._keys else None
        scope["offramp_salt"] = None if known is None else str(known)
        if self._keys and scope["path"] not in OPEN and known is None:
            wanted = 'Basic realm="offramp", charset="UTF-8"' if scope["path"] == "/" else "Bearer"
            raise ApiError(
                401,
                "A key is missing or wrong. Send the header Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": wanted},
            )
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        most = min(self._config.body, SMALL.get(scope["path"], self._config.body))
        body = await self._body(headers, receive, most)
        body_sent = False

        async def whole() -> Message:
            nonlocal body_sent
            if body_sent:
                return await receive()
            body_sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        try:
            await self._app(scope, whole, send)
        finally:
            self._held -= len(body)

    def _check_host(self, scope: Scope, headers: Headers) -> None:
        """Raise `ApiError` where the server is asked for under a name that is not its own: a page
        of another site may have let its name lead here."""
        allowed, host = self._config.hosts, headers.get("host")
        if not allowed or "*" in allowed or host is None or scope["path"] in OPEN:
            return
        name, here = host_name(host), (scope.get("server") or ("",))[0]
        if name is None or not (name == here or is_among(name, allowed)):
            raise ApiError(
                421,
                f"This server is not {host[:200]!r}. Ask for it by an address of its own, or start "
                "it with --allowed-hosts.",
                code="host_not_allowed",
            )

    def _known(self, headers: Headers) -> int | None:
        """The key that was sent, as a bearer token or a browser's password; None: none."""
        # A header's bytes as they came, which are UTF-8 as the keys are.
        header = headers.get("authorization", "").encode("latin-1", "replace")
        kind, _, sent = header.partition(b" ")
        sent = sent.strip()
        if kind.lower() == b"basic":
            try:
                sent = base64.b64decode(sent, validate=True).partition(b":")[2]
            except (binascii.Error, ValueError):
                return None
        elif kind.lower() != b"bearer":
            return None
        # All are compared, so that the time does not show which one is close.
        same = [hmac.compare_digest(sent, key) for key in self._keys]
        return same.index(True) if any(same) else None

    async def _body(self, headers: Headers, receive: Receive, most: int) -> bytes:
        """The whole body, of `most` bytes and no slower than allowed; its bytes count as held."""
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and (len(declared) > 19 or int(declared) > most):
            raise _too_large(most)
        body = bytearray()
        try:
            async with asyncio.timeout(self._config.body_seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "The body is not whole.", code="incomplete_body")
                    body += self._taken(message.get("body", b""))
                    more = message.get("more_body", False)
                    if len(body) > most:
                        raise _too_large(most)
        except BaseException as error:
            self._held -= len(body)
            if not isinstance(error, TimeoutError):
                raise
            raise ApiError(
                408,
                f"The body took longer than {self._config.body_seconds:g} seconds to come.",
                code="timeout",
                headers={"Connection": "close"},
            ) from None
        return bytes(body)

    def _taken(self, part: bytes) -> bytes:
        """A part of a body, where there is memory for it."""
        if self._held + len(part) > self._config.bodies:
            raise ApiError(
                429,
                f"The server is busy: it holds {self._held} bytes of other requests.",
                code="queue_full",
                headers={"Retry-After": "1", "Connection": "close"},
            )
        self._held += len(part)
        return part

    def _log(self, scope: Scope, name: str, status: int, seconds: float) -> None:
        """One JSON object a request; never what was asked or answered."""
        if scope["path"] in (*OPEN, "/metrics") and status < 400:
            return
        client = scope.get("client")
        row: dict[str, Any] = {
            "request_id": name,
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": status,
            "seconds": round(seconds, 4),
            "client": client[0] if client else None,
            **scope["offramp"],
        }
        access.info(json.dumps(row))


def _too_large(most: int) -> ApiError:
    return ApiError(
        413,
        f"The body is larger than the {most} bytes allowed.",
        code="body_too_large",
        headers={"Connection": "close"},
    )


def keys_of(text: str) -> Sequence[str]:
    """Return the keys in a file, one a line; lines that begin with # are comments."""
    text = text.removeprefix("\ufeff")  # as some editors begin a file
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


_HOST = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9._-]+))(?::[0-9]{1,5})?")


def host_name(header: str) -> str | None:
    """Return the name or address in a `Host` header, in lower case; None where it is neither."""
    match = _HOST.fullmatch(header.strip())
    return None if match is None else (match[1] or match[2]).rstrip(".").lower() or None
