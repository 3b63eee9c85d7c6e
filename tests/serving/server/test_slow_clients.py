"""Laws of clients that are slow or say nothing: each is given up in time and keeps nobody out."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from offramp.serving.server.service import Service
from serving import messages, running, scene_examples, service_of

WITHIN = 180.0
"""Seconds; a machine that others use too."""
CHAT = "/v1/chat/completions"
Server = tuple[Service, tuple[str, int]]


@contextlib.contextmanager
def served(**config: object) -> Iterator[Server]:
    service = service_of(**config)  # type: ignore[arg-type]
    with running(service) as url:
        host, port = url.removeprefix("http://").split(":")
        yield service, (host, int(port))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served(slots=2, queue=3, send_seconds=0.5, body_seconds=0.5) as found:
        yield found


def until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + WITHIN
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def ended(line: socket.socket, within: float = WITHIN) -> bytes:
    """What is read until the server closes."""
    line.settimeout(within)
    found = b""
    with contextlib.suppress(ConnectionError):
        while part := line.recv(65536):
            found += part
    return found


def one(line: socket.socket) -> bytes:
    """The answer to `WHOLE`."""
    line.settimeout(WITHIN)
    found = b""
    while not found.endswith(b"}"):
        part = line.recv(65536)
        assert part, found
        found += part
    return found


def asked(**fields: object) -> bytes:
    body = {"messages": messages(scene_examples()[0]), "ignore_eos": True, **fields}
    content = json.dumps(body).encode()
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content) + content
    )


def line_to(address: tuple[str, int]) -> socket.socket:
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    line.connect(address)
    return line


def over(service: Service) -> float:
    """Answers that have ended."""
    lines = service.metrics.text().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if "request_success_total{" in line)


def closed(line: socket.socket) -> bool:
    """Whether the server has given the connection up, which can then not be written to."""
    try:
        line.sendall(b"\r\n")
    except OSError:
        return True
    return False


# -- who does not read -----------------------------------------------------------------------------


def test_who_does_not_read_keeps_no_place(server: Server) -> None:
    service, address = server
    lines = [line_to(address) for _ in range(service.room)]
    try:
        for line in lines:
            line.sendall(asked(stream=True, max_tokens=20))
        until(lambda: service.under_way == 0)
    finally:
        for line in lines:
            line.close()


def test_a_place_is_free_when_the_engine_is_done(server: Server) -> None:
    """Not when the client has read the answer: of five that read nothing, a sixth is answered."""
    service, address = server
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            line = stack.enter_context(contextlib.closing(line_to(address)))
            line.sendall(asked(stream=True, n=4, max_tokens=30, logprobs=True, top_logprobs=20))
            until(lambda: service.under_way == 0)
        found = httpx.post(
            f"http://{address[0]}:{address[1]}{CHAT}",
            json={"messages": messages(scene_examples()[0]), "max_tokens": 2},
            timeout=WITHIN,
        )
        assert found.status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("read", [0, 200])
def test_a_stream_that_is_not_taken_is_given_up(server: Server, read: int) -> None:
    """With the answers that it still asks for. read: bytes a tenth of a second."""
    service, address = server
    line = line_to(address)
    before = over(service)
    line.sendall(asked(stream=True, n=2, max_tokens=200, logprobs=True, top_logprobs=20) * 20)
    stop = threading.Event()

    def sip() -> None:
        with contextlib.suppress(OSError):
            while not stop.wait(0.1):
                line.recv(read)

    reader = threading.Thread(target=sip)
    if read:
        reader.start()
    try:
        until(lambda: closed(line))
        until(lambda: service.under_way == 0 and service.engine.running == 0)
        assert over(service) - before < 40
    finally:
        stop.set()
        if read:
            reader.join()
        line.close()


def test_an_answer_that_is_not_taken_does_not_keep_its_connection() -> None:
    with served(slots=2, send_seconds=0.3, body_seconds=0.3) as (_, address):
        line = line_to(address)
        # The kernel takes a few hundred kB of answers; what is behind them waits for the client.
        flood = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2000
        line.settimeout(WITHIN)
        with contextlib.suppress(OSError):
            line.sendall(flood)
            while True:  # a connection that was given up cannot be written to
                time.sleep(0.05)
                line.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        line.close()


# -- who does not ask ------------------------------------------------------------------------------

WHOLE = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
HALVES = {
    "nothing": b"",
    "half a header": b"GET /health HTTP/1.1\r\nHost: loc",
    "a kept connection, half a header": WHOLE + b"GET /hea",
    "two kept, half a header": WHOLE * 2 + b"GET /health HTTP/1.1\r\n",
    "a body that nobody reads": b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    b"Content-Length: 1000000\r\n\r\n",
    "line ends alone": WHOLE + b"\r\n",
}


@pytest.mark.parametrize("drips", [False, True])
@pytest.mark.parametrize("name", HALVES)
def test_a_request_that_does_not_come_is_given_up(server: Server, name: str, drips: bool) -> None:
    _, address = server
    with line_to(address) as line:
        line.sendall(HALVES[name])
        begun, stop = time.monotonic(), threading.Event()

        def drip() -> None:
            time.sleep(0.1)
            with contextlib.suppress(OSError):
                while not stop.wait(0.05):
                    line.sendall(b"\n" if "ends" in name else b"a")

        thread = threading.Thread(target=drip)
        if drips:
            thread.start()
        try:
            answer = ended(line, 20.0)
        finally:
            stop.set()
            if drips:
                thread.join()
        assert time.monotonic() - begun < 15
        assert answer.count(b"HTTP/1.1 200") == HALVES[name].count(
            b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
        )


def test_a_header_that_is_too_large_is_answered_while_the_rest_still_comes(server: Server) -> None:
    with line_to(server[1]) as line:
        line.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"a" * 40_000)
        select.select([line], [], [], WITHIN)  # it was refused by now
        line.sendall(b"a" * 30_000 + b"\r\n\r\n")
        time.sleep(0.2)
        found = ended(line)
    assert found.startswith(b"HTTP/1.1 431 ")
    assert "32768 bytes" in json.loads(found.partition(b"\r\n\r\n")[2])["error"]["message"]


def test_a_kept_connection_is_used_again_after_a_pause(server: Server) -> None:
    _, address = server
    with line_to(address) as line:
        for _ in range(3):
            line.sendall(WHOLE)
            assert one(line).startswith(b"HTTP/1.1 200")
            time.sleep(0.7)  # longer than a header may take


# -- many ------------------------------------------------------------------------------------------


def test_a_connection_beyond_the_bound_takes_the_place_of_one_that_asks_nothing() -> None:
    with served(slots=2, connections=20, body_seconds=60.0) as (_, address):
        lines = [line_to(address) for _ in range(60)]
        try:
            url = f"http://{address[0]}:{address[1]}/ready"
            assert httpx.get(url, timeout=WITHIN).is_success
            assert b"too_many_connections" in ended(lines[0])
            lines[59].sendall(WHOLE)  # the youngest are still there
            assert one(lines[59]).startswith(b"HTTP/1.1 200")
        finally:
            for line in lines:
                line.close()


@pytest.mark.slow
def test_who_is_being_answered_is_not_closed_for_others() -> None:
    with served(slots=4, connections=3) as (service, address):
        service.engine.core.clock = lambda: time.sleep(0.002) or time.perf_counter()  # type: ignore
        busy = [line_to(address) for _ in range(3)]
        for line in busy:
            line.sendall(asked(max_tokens=150).replace(b"Host", b"Connection: close\r\nHost"))
        until(lambda: service.under_way == 3)
        with line_to(address) as late:
            assert b"503" in ended(late)[:20]
        for line in busy:
            assert ended(line).startswith(b"HTTP/1.1 200")
            line.close()
