"""OpenAI's API over one `EdgeModel`, by the standard library."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import json
import logging
import re
import secrets
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from offramp.engine.policy import Thresholds
from offramp.errors import InputError, OfframpError
from offramp.runtimes.edge.model import Answer, EdgeModel
from offramp.runtimes.edge.sampling import Sampling
from offramp.runtimes.llama_cpp.projector import MARKER

log = logging.getLogger(__name__)

_LARGEST, _SECONDS, _WAITING = 32 << 20, 60, 32
"""Bytes of a body, seconds that a peer may be silent, requests that wait at most."""
_GONE = (ConnectionError, TimeoutError, CancelledError)
"""What is raised where the peer has gone."""
_KNOWN = {
    "model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p",
    "top_k", "repetition_penalty", "seed", "stop", "stream", "stream_options", "n", "offramp",
    "user", "frequency_penalty", "presence_penalty", "logprobs",
}  # fmt: skip


@dataclass(frozen=True)
class _Asked:
    """A request, read and checked. how: as `EdgeModel.answer` takes it."""

    how: Mapping[str, Any]
    images: tuple[bytes, ...]
    stream: bool
    usage: bool


class EdgeServer(ThreadingHTTPServer):
    """Serves a model until `shutdown`. page: what `/` shows."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, model: EdgeModel, host: str, port: int, *, name: str, page: bytes) -> None:
        """Raise `InputError` where the address cannot be listened at."""
        self.model, self.name, self.page = model, name, page
        self.started = int(time.time())
        self.places = threading.BoundedSemaphore(_WAITING)
        self._host = host
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise InputError(
                f"{host}:{port} cannot be listened at: {why}.",
                "Give another --port, or 0 for one that is free.",
            ) from error

    def knows(self, host: str) -> bool:
        """Whether a request's Host is this server's: a page elsewhere that was led here by a name
        of its own is refused."""
        name = re.sub(r":\d*$", "", host).strip("[]").lower()
        if name in ("localhost", self._host.lower()):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


class _Handler(BaseHTTPRequestHandler):
    server: EdgeServer
    protocol_version = "HTTP/1.1"
    timeout = _SECONDS
    server_version = "offramp"
    sys_version = ""

    def do_GET(self) -> None:
        if self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # a body that nobody reads is no next request
        if not self._allowed():
            return
        routes: dict[str, Callable[[], None]] = {
            "/": lambda: self._send(200, self.server.page, "text/html; charset=utf-8"),
            "/health": lambda: self._json(200, {"status": "ok"}),
            "/ready": lambda: self._json(200, {"status": "ready"}),  # it listens once it has loaded
            "/v1/models": lambda: self._json(200, {"object": "list", "data": [self._card()]}),
        }
        route = routes.get(self.path.partition("?")[0])
        route() if route is not None else self._refuse(404, f"There is no {self.path[:80]}.")

    def do_POST(self) -> None:
        self._streams = False
        if not self._allowed():
            return
        if self.path not in ("/v1/chat/completions", "/v1/completions"):
            self._refuse(404, f"There is no {self.path[:80]}.")
            return
        chat = self.path.startswith("/v1/chat")
        try:
            asked = read_request(self._body(), chat=chat)
            if not self.server.places.acquire(blocking=False):
                self._refuse(503, "Too many requests wait already.")
                return
            try:
                self._answer(asked, chat=chat)
            finally:
                self.server.places.release()
        except _GONE:
            raise
        except Exception as error:
            self._fail(error)

    # -- answers --------------------------------------------------------------------------------

    def _answer(self, asked: _Asked, *, chat: bool) -> None:
        reply = _Reply(self.server.name, chat=chat)
        with ExitStack() as stack:
            files = [_kept(stack, image) for image in asked.images]

            def tell(text: str) -> None:
                self._event(reply.part(text))

            answer = self.server.model.answer(
                images=files, on_text=tell if asked.stream else None, gone=self._gone, **asked.how
            )
        if not asked.stream:
            self._json(200, reply.whole(answer))
            return
        self._event(reply.end(answer))
        if asked.usage:
            self._event(reply.usage(answer))
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _card(self) -> dict[str, Any]:
        model = self.server.model
        return {
            "id": self.server.name,
            "object": "model",
            "created": self.server.started,
            "owned_by": "offramp",
            "root": model.name,
            "max_model_len": model.engine.context,
            "input_modalities": ["text", "image"] if model.reads_images else ["text"],
            "offramp": {
                "layers": model.layers,
                "exits": list(model.files.depths),
                "thresholds": Thresholds(model.policy.thresholds).to_json(),
                "guarantee": None,
                "watch": None,
                "chat_template": model.vocabulary.has_template,
            },
        }

    # -- what comes and goes --------------------------------------------------------------------

    def _allowed(self) -> bool:
        if self.server.knows(self.headers.get("Host", "")):
            return True
        self._refuse(403, "This server does not answer to that name.")
        return False

    def _gone(self) -> bool:
        """Whether the peer has hung up."""
        self.connection.settimeout(0)
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:  # it says nothing, and waits
            return False
        except OSError:
            return True
        finally:
            self.connection.settimeout(self.timeout)

    def _body(self) -> Any:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,9}", length) or int(length) > _LARGEST:
            self.close_connection = True
            raise InputError(
                "The body has no length, or is too long.", f"Send up to {_LARGEST >> 20} MB."
            )
        try:
            return json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise InputError("The body is no JSON.", "Send an object.") from error

    def _json(self, status: int, value: Any) -> None:
        self._send(status, json.dumps(value).encode(), "application/json")

    def _fail(self, error: Exception) -> None:
        """Say what is wrong, in the stream where one has begun."""
        if isinstance(error, OfframpError):
            remedy = error.remedy.replace("max_new_tokens", "max_tokens")  # as the API has it
            status, said = 400, f"{error.problem} {remedy}"
        else:
            log.error("A request failed.", exc_info=error)
            status, said = 500, "The server failed; its log says how."
        if not self._streams:
            self._refuse(status, said)
            return
        self._event({"error": {"message": said, "type": "server_error"}})
        self._chunk(b"")

    def _refuse(self, status: int, message: str) -> None:
        """And close: whether all was read that the peer sent is not known."""
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.close_connection = True
        self._json(status, {"error": {"message": message, "type": kind, "code": None}})

    def _send(self, status: int, data: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def _event(self, value: Any) -> None:
        if not self._streams:
            self._streams = True
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Cache-Control", "no-cache")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
        self._chunk(b"data: " + json.dumps(value).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def log_message(self, format: str, *arguments: Any) -> None:
        log.debug(format, *arguments)

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except _GONE:
            self.close_connection = True


class _Reply:
    def __init__(self, model: str, *, chat: bool) -> None:
        self._chat = chat
        kind = "chat.completion" if chat else "text_completion"
        self._kind = kind
        self._head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, answer: Answer) -> dict[str, Any]:
        text = (
            {"message": {"role": "assistant", "content": answer.text}}
            if self._chat
            else {"text": answer.text}
        )
        depths = [step.depth for step in answer.steps]
        choice = {"index": 0, **text, "finish_reason": answer.finish, "offramp": {"depths": depths}}
        return {**self._head, "object": self._kind, "choices": [choice], "usage": _usage(answer)}

    def part(self, text: str) -> dict[str, Any]:
        return self._streamed({"content": text} if self._chat else text, None)

    def end(self, answer: Answer) -> dict[str, Any]:
        return self._streamed({} if self._chat else "", answer.finish)

    def usage(self, answer: Answer) -> dict[str, Any]:
        return {**self._streamed({} if self._chat else "", None), "choices": [],
                "usage": _usage(answer)}  # fmt: skip

    def _streamed(self, content: Any, finish: str | None) -> dict[str, Any]:
        kind = f"{self._kind}.chunk" if self._chat else self._kind
        choice = {"index": 0, "delta" if self._chat else "text": content, "finish_reason": finish}
        return {**self._head, "object": kind, "choices": [choice]}


def _usage(answer: Answer) -> dict[str, Any]:
    written = len(answer.steps)
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": written,
        "total_tokens": answer.prompt_tokens + written,
        "offramp": {"mean_depth": answer.mean_depth, "layers": answer.layers},
    }


def read_request(body: Any, *, chat: bool) -> _Asked:
    """Raise `InputError` for what OpenAI's API or this server does not take."""
    if not isinstance(body, dict):
        raise InputError("The body is no object.", "Send a JSON object.")
    unknown = sorted(set(body) - _KNOWN)
    if unknown:
        raise InputError(f"{unknown[0][:60]!r} is not known here.", "Leave it out.")
    for name, plain in (("n", 1), ("frequency_penalty", 0), ("presence_penalty", 0)):
        if body.get(name) not in (None, plain):
            raise InputError(f"{name} is {plain} here.", "Leave it out.")
    if body.get("logprobs"):
        raise InputError("Log-probabilities are not given here.", "Leave logprobs out.")
    images: list[bytes] = []
    if chat:
        prompt: Any = _messages(body.get("messages"), images)
    else:
        prompt = _typed(body, "prompt", str, "")
    stop = _typed(body, "stop", (str, list), [])
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stop) > 16 or not all(isinstance(s, str) and len(s) < 1000 for s in stop):
        raise InputError("stop is no text and no list of texts.", "Send up to 16 strings.")
    more = _typed(body, "offramp", dict, {})
    options = _typed(body, "stream_options", dict, {})
    most = _typed(body, "max_completion_tokens", int, _typed(body, "max_tokens", int, None))
    seed = _typed(body, "seed", int, None)
    sampling = Sampling(
        _number(body, "temperature", 0.0),
        _number(body, "top_p", 1.0),
        _typed(body, "top_k", int, 0),
        _number(body, "repetition_penalty", 1.0),
        secrets.randbits(63) if seed is None else seed,
    )
    how = {
        "prompt": prompt,
        "max_new_tokens": most,
        "mode": _typed(more, "mode", str, None),
        "sampling": sampling,
        "stop": stop,
    }
    stream = bool(_typed(body, "stream", bool, False))
    return _Asked(how, tuple(images), stream, bool(options.get("include_usage")))


def _typed(body: Mapping[str, Any], name: str, kind: Any, default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{name} is of the type {type(value).__name__}.", "See OpenAI's API.")
    return value


def _number(body: Mapping[str, Any], name: str, default: float) -> float:
    try:
        return float(_typed(body, name, (int, float), default))
    except OverflowError as error:
        raise InputError(f"{name} is too large.", "See OpenAI's API.") from error


def _messages(messages: Any, images: list[bytes]) -> Sequence[dict[str, str]]:
    """Roles and texts; an image stands where its part does."""
    if not isinstance(messages, list) or not messages:
        raise InputError("There are no messages.", "Send a list with at least one.")
    found = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError("A message has no role.", "Send role and content.")
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list):
            raise InputError("A message has no content.", "Send a text or a list of parts.")
        text = "".join(_part(part, images) for part in parts)
        found.append({"role": message["role"], "content": text})
    return found


def _part(part: Any, images: list[bytes]) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"]).replace(MARKER, "")
    url = part.get("image_url") if isinstance(part, dict) else None
    url = url.get("url") if isinstance(url, dict) else url
    if not isinstance(url, str) or not url.startswith("data:image/") or ";base64," not in url:
        raise InputError(
            "A part of a message is no text and no image in it.",
            "Send images as data:image/png;base64,... URLs.",
        )
    try:
        images.append(base64.b64decode(url.partition(";base64,")[2], validate=True))
    except (binascii.Error, ValueError) as error:
        raise InputError("An image is no base64.", "Encode the file's bytes.") from error
    if len(images) > 8:
        raise InputError("More than 8 images came.", "Send fewer.")
    return MARKER


def _kept(stack: ExitStack, image: bytes) -> str:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    file = Path(folder) / "image"
    file.write_bytes(image)
    return str(file)
