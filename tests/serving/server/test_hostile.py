"""Two hundred hostile requests: each is answered by an error object, and the server lives on."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import httpx
import pytest
from hostile import HEAD, LINES, WITHIN, check_hostile, check_line, table, talk

from offramp.serving.server.service import Service
from serving import NAME, running, service_of


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    from offramp.serving.server.config import ImageLimits

    limits = ImageLimits(pixels=4_000_000, domains=("allowed.org",))
    found = service_of(queue=100, images=limits)
    found.images.fetcher.__dict__["resolve"] = lambda *_: ["127.0.0.1"]
    yield found
    found.close()


@pytest.mark.slow
def test_every_hostile_request_gets_an_error_object(service: Service) -> None:
    assert len(table()) >= 200
    check_hostile(service)


# -- below HTTP ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    limits = {"body_seconds": 0.5, "body": 100_000, "bodies": 150_000}
    with running(service_of(slots=1, **limits)) as found:
        host, port = found.removeprefix("http://").split(":")
        yield host, int(port)


@pytest.mark.parametrize("name", LINES)
def test_what_is_hostile_below_http_is_answered_too(name: str, address: tuple[str, int]) -> None:
    check_line(name, address)


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
    for _ in range(2):  # of one that was answered nothing is held
        assert talk(address, head + b" " * 90_000).startswith(b"HTTP/1.1 400")


def test_two_hundred_lines_that_say_nothing_keep_nobody_out(address: tuple[str, int]) -> None:
    lines = [socket.create_connection(address) for _ in range(200)]
    try:
        assert httpx.get(f"http://{address[0]}:{address[1]}/ready", timeout=WITHIN).is_success
    finally:
        for line in lines:
            line.close()
    assert NAME
