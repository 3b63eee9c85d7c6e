"""Two hundred hostile requests: each is answered by an error object, and the server lives on."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hostile import (
    BODIES,
    CHAT,
    CONVERSATIONS,
    FIELDS,
    GOOD,
    OTHERS,
    TEXT,
    TEXTS,
    URI,
    URLS,
    image,
    sent,
)

from offramp.serving.server.app import create_app
from offramp.serving.server.service import Service
from serving import NAME, running, service_of

WITHIN = 60.0
"""Seconds; a machine that others use too."""


def table() -> list[tuple[str, str, Any]]:
    rows: list[tuple[str, str, Any]] = [
        ("POST", CHAT, {"messages": GOOD, name: value})
        for name, values in FIELDS.items()
        for value in values
    ]
    rows += [("POST", CHAT, {"messages": found}) for found in CONVERSATIONS]
    rows += [("POST", CHAT, {"messages": image(url)}) for url in URLS]
    rows += [("POST", CHAT, {"messages": image(URI, detail=d)}) for d in ("huge", 5)]
    rows += [("POST", CHAT, body) for body in BODIES]
    rows += [("POST", TEXT, {"max_tokens": 5, **fields}) for fields in TEXTS]
    return [*rows, *OTHERS]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    from offramp.serving.server.config import ImageLimits

    limits = ImageLimits(pixels=4_000_000, domains=("allowed.org",))
    found = service_of(queue=100, images=limits)
    found.images.fetcher.__dict__["resolve"] = lambda *_: ["127.0.0.1"]
    yield found
    found.close()


def test_every_hostile_request_gets_an_error_object(service: Service) -> None:
    rows = table()
    assert len(rows) >= 200

    async def one(client: httpx.AsyncClient, row: tuple[str, str, Any]) -> tuple[float, Any]:
        method, path, body = row
        headers = {"Content-Type": "application/json"}
        begun = time.monotonic()
        found = await client.request(method, path, content=sent(body), headers=headers)
        return time.monotonic() - begun, found

    async def everything() -> tuple[list[tuple[float, Any]], Any]:
        transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            found = [await one(client, row) for row in rows]
            alive = await client.post(CHAT, json={"messages": GOOD, "max_tokens": 3})
            return found, alive

    found, alive = asyncio.run(everything())
    wrong = []
    for row, (seconds, response) in zip(rows, found, strict=True):
        name = f"{row[1]} {sent(row[2])[-120:]!r}"
        try:
            error = response.json()["error"]
            fine = set(error) == {"message", "type", "param", "code"} and error["message"]
        except Exception:
            fine = False
        if not fine or not 400 <= response.status_code < 500 or seconds > WITHIN:
            wrong.append((name, response.status_code, round(seconds, 2), response.text[:200]))
    assert wrong == []
    assert alive.status_code == 200
    assert service.under_way == 0
    assert service.engine.running == 0


# -- below HTTP ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    limits = {"body_seconds": 0.5, "body": 100_000, "bodies": 150_000}
    with running(service_of(slots=1, **limits)) as found:
        host, port = found.removeprefix("http://").split(":")
        yield host, int(port)


def talk(address: tuple[str, int], *parts: bytes, wait: float = 0.0) -> bytes:
    """What comes back for what is sent, with pauses between the parts."""
    with socket.create_connection(address, timeout=WITHIN) as line:
        for number, part in enumerate(parts):
            if number:
                time.sleep(wait)
            try:
                line.sendall(part)
            except OSError:
                break  # it was answered already
        answer = b""
        try:
            while more := line.recv(65536):
                answer += more
        except ConnectionError:
            pass
        return answer


HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    b"Content-Type: application/json\r\n"
)

LINES = {
    "no HTTP": (b"\x00\x01\x02\r\n\r\n",),
    "a TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200) + b"\r\n\r\n",),
    "a header flood": (b"GET /health HTTP/1.1\r\n", b"X: " + b"a" * 200_000 + b"\r\n\r\n"),
    "many headers": (
        b"GET /health HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(9999)) + b"\r\n",
    ),
    "a long address": (
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    ),
    "a bad length": (HEAD + b"Content-Length: x\r\n\r\n{}",),
    "a negative length": (HEAD + b"Content-Length: -5\r\n\r\n{}",),
    "two lengths": (HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}",),
    "a bad chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",),
    "a body that is declared too large": (HEAD + b"Content-Length: 99999999999\r\n\r\n",),
    "a body that is too large": (
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n",
        *[b"4000\r\n" + b" " * 0x4000 + b"\r\n"] * 10,
    ),
    "a body that does not come": (HEAD + b"Content-Length: 50\r\n\r\n", b"{"),
    "a header that does not come": (HEAD,),
    "nothing at all": (b"",),
}


@pytest.mark.parametrize("name", LINES)
def test_what_is_hostile_below_http_is_answered_too(name: str, address: tuple[str, int]) -> None:
    begun = time.monotonic()
    answer = talk(address, *LINES[name], wait=0.1)
    assert time.monotonic() - begun < WITHIN
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 4"), answer[:200]
    assert json.loads(body)["error"]["message"]
    assert httpx.get(f"http://{address[0]}:{address[1]}/health").status_code == 200


def test_bodies_of_all_requests_together_are_bounded(address: tuple[str, int]) -> None:
    head = HEAD + b"Content-Length: 90000\r\n\r\n"
    with socket.create_connection(address, timeout=WITHIN) as first:
        first.sendall(head + b" " * 89_000)
        codes = []
        while codes[-1:] != [b"429"]:  # until the first body is there
            codes.append(talk(address, head + b" " * 90_000)[9:12])
            assert len(codes) < 100
        while first.recv(65536):  # it took too long
            pass
    assert talk(address, head + b" " * 90_000).startswith(b"HTTP/1.1 400")


def test_two_hundred_lines_that_say_nothing_keep_nobody_out(address: tuple[str, int]) -> None:
    lines = [socket.create_connection(address) for _ in range(200)]
    try:
        assert httpx.get(f"http://{address[0]}:{address[1]}/ready", timeout=WITHIN).is_success
    finally:
        for line in lines:
            line.close()
    assert NAME
