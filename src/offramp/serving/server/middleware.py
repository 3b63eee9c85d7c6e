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

from offramp.serving.server.config import ServerConfig
from offramp.serving.server.errors import ApiError, api_error, respond

access = logging.getLogger("offramp.serving.access")
OPEN = ("/health", "/ready")
"""What needs no key: what a load balancer asks."""
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Gate:
    """An ASGI middleware. refused: called with the status of every answer that is an error.

    A route may put what is worth a log line into `scope["offramp"]`.
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
                MutableHeaders(scope=message)["x-request-id"] = name
                MutableHeaders(scope=message)["x-content-type-options"] = "nosniff"
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
        if self._keys and scope["path"] not in OPEN and not self._known(headers):
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
        body = await self._body(headers, receive)
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

    def _known(self, headers: Headers) -> bool:
        """Whether a key was sent: as a bearer's or, by a browser, as a password."""
        kind, _, value = headers.get("authorization", "").partition(" ")
        sent = value.strip().encode("utf-8", "replace")
        if kind.lower() == "basic":
            try:
                sent = base64.b64decode(sent, validate=True).partition(b":")[2]
            except (binascii.Error, ValueError):
                return False
        elif kind.lower() != "bearer":
            return False
        # All are compared, so that the time does not show which one is close.
        return any([hmac.compare_digest(sent, key) for key in self._keys])

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """The whole body, no larger and no slower than allowed; its bytes count as held."""
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and (len(declared) > 19 or int(declared) > self._config.body):
            raise self._too_large()
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
                    if len(body) > self._config.body:
                        raise self._too_large()
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

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"The body is larger than the {self._config.body} bytes allowed.",
            code="body_too_large",
            headers={"Connection": "close"},
        )

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


def keys_of(text: str) -> Sequence[str]:
    """Keys in a file or a variable: one a line, or with commas between; lines with # are none."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return [key.strip() for line in lines for key in line.split(",") if key.strip()]
