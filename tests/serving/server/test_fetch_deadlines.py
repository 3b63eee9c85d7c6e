"""Laws of fetching: a host that is slow, in whichever part of its answer, holds a thread no longer
than the deadline; an address that is not of the open internet is not connected to in any form."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from offramp.serving.server.config import ImageLimits
from offramp.serving.server.errors import ApiError
from offramp.serving.server.inputs.fetch import Fetcher, is_public
from offramp.serving.server.inputs.images import ImageSource
from serving import data_uri, service_of

SECONDS = 0.6
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
SLOW: dict[str, tuple[bytes, bytes]] = {
    "nothing": (b"", b""),
    "status line": (b"HTTP/1.1 200 ", b"O"),
    "header": (b"HTTP/1.1 200 OK\r\nX: ", b"a"),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X: a\r\n"),
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "header of a continue": (b"HTTP/1.1 100 Continue\r\n", b"X: a\r\n"),
    "body": (b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n", b"a"),
    "body without a length": (b"HTTP/1.1 200 OK\r\n\r\n", b"a"),
    "chunk size": (CHUNKED, b"0"),
    "chunk extension": (CHUNKED + b"1;", b"a"),
    "chunk": (CHUNKED + b"fff\r\n", b"a"),
    "trailer": (CHUNKED + b"0\r\n", b"X: a\r\n"),
    "redirect": (b"HTTP/1.1 302 Found\r\nX: ", b"a"),
}


@contextlib.contextmanager
def host(
    first: bytes, then: bytes, pause: float = 0.02, secure: Path | None = None
) -> Iterator[int]:
    """A host that answers `first`, and then `then` again and again; its port."""
    over = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))
    context = None
    if secure is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(secure)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                line, _ = listener.accept()
                threading.Thread(target=answer, args=(line,), daemon=True).start()

    def answer(line: socket.socket) -> None:
        with contextlib.suppress(OSError), line:
            if context is not None:
                line = context.wrap_socket(line, server_side=True)
            line.recv(65536)
            line.sendall(first)
            while not over.is_set():
                line.sendall(then)
                time.sleep(pause)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        over.set()
        listener.close()


def fetcher(**limits: float) -> Fetcher:
    settings = ImageLimits(domains=("example.org",), seconds=SECONDS, **limits)  # type: ignore[arg-type]
    return Fetcher(settings, lambda *_: ["127.0.0.1"], lambda _: True)


def refused_in_time(url: str) -> None:
    begun = time.monotonic()
    with pytest.raises(ApiError) as refused:
        fetcher().fetch(url)
    assert refused.value.status in (400, 413)
    assert time.monotonic() - begun < SECONDS + 2  # a machine that others use too


@pytest.mark.parametrize(
    ("part", "pause"),
    [*((part, 0.02) for part in SLOW), *((part, 0.0) for part in SLOW if "body" not in part)],
)
def test_a_slow_host_holds_a_thread_no_longer_than_the_deadline(part: str, pause: float) -> None:
    first, then = SLOW[part]
    with host(first, then, pause) as port:
        refused_in_time(f"http://example.org:{port}/a.png")


def test_one_deadline_holds_for_all_redirects() -> None:
    again = b"HTTP/1.1 302 Found\r\nLocation: /%d\r\nContent-Length: 0\r\n\r\n"
    with host(again, b"", 0.0) as port, host(b"", b"HTTP/1.1 100 C\r\n\r\n") as slow:
        moved = b"HTTP/1.1 302 Found\r\nLocation: http://example.org:%d/\r\n\r\n" % slow
        with host(moved, b"") as first:
            refused_in_time(f"http://example.org:{first}/a.png")
        with pytest.raises(ApiError, match="redirects more"):
            fetcher().fetch(f"http://example.org:{port}/a.png")


def test_a_host_that_never_shakes_hands_is_given_up() -> None:
    with host(b"", b"") as port:
        refused_in_time(f"https://example.org:{port}/a.png")


def test_a_slow_host_behind_tls_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = tmp_path / "pair.pem"
    made = subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-keyout",
            pair,
            "-out",
            tmp_path / "cert.pem",
            "-subj",
            "/CN=example.org",
            "-addext",
            "subjectAltName=DNS:example.org",
        ],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("no openssl here")
    cert = (tmp_path / "cert.pem").read_text()
    pair.write_text(pair.read_text() + cert)
    trusting = ssl.create_default_context(cadata=cert)
    monkeypatch.setattr(ssl, "create_default_context", lambda: trusting)
    with host(*SLOW["headers"], secure=pair) as port:
        refused_in_time(f"https://example.org:{port}/a.png")
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"
    with host(whole, b"", secure=pair) as port:
        assert fetcher().fetch(f"https://example.org:{port}/a.png") == b"abc"


@pytest.mark.parametrize("part", ["nothing", "body"])
def test_what_nobody_wants_any_more_is_not_fetched_to_the_deadline(part: str) -> None:
    unwanted, begun = threading.Event(), time.monotonic()
    threading.Timer(0.1, unwanted.set).start()
    patient = Fetcher(
        ImageLimits(domains=("example.org",), seconds=60.0),
        lambda *_: ["127.0.0.1"],
        lambda _: True,
    )
    with host(*SLOW[part]) as port, pytest.raises(ApiError):
        patient.fetch(f"http://example.org:{port}/a.png", unwanted)
    assert time.monotonic() - begun < 20  # a machine that others use too


def test_hosts_that_do_not_answer_hold_up_no_image_that_is_sent_along() -> None:
    """However many wait for them."""
    go, waiting = threading.Event(), threading.Semaphore(0)

    def resolve(*_: object) -> list[str]:
        waiting.release()
        go.wait(60)
        raise OSError

    limits = ImageLimits(domains=("example.org",))
    service = service_of(slots=1, more={"images": ImageSource(limits, Fetcher(limits, resolve))})
    picture = data_uri(Image.new("RGB", (8, 8)))

    async def ask() -> None:
        far = [f"http://example.org/{number}.png" for number in range(40)]
        held = asyncio.ensure_future(service.prepare(far, lambda images: {}))
        while not waiting.acquire(blocking=False):
            await asyncio.sleep(0.01)
        _, [image] = await asyncio.wait_for(service.prepare([picture], lambda _: {}), 20)
        assert image.size == (8, 8) and not held.done()
        go.set()
        with pytest.raises(ApiError, match="not known"):
            await held

    try:
        asyncio.run(ask())
    finally:
        go.set()
        service.close()


# -- addresses -------------------------------------------------------------------------------------

INNER = ("127.0.0.1", "10.1.2.3", "169.254.169.254", "192.168.0.1", "100.64.0.1", "0.0.0.1")
FORMS = (
    "{0}",
    "::ffff:{0}",
    "::{0}",
    "::ffff:0:{0}",
    "64:ff9b::{0}",
    "64:ff9b:1::{0}",
    "2002:{1}:{2}::",
    "2001:db8::{0}",
    "fec0::{0}",
    "fc00::{0}",
    "fe80::5efe:{0}",
    "2606:2800:220:1:0:5efe:{1}:{2}",
    "2606:2800:220:1:200:5efe:{1}:{2}",
    "2001:0:7f00:1::{3}:{4}",
    "64:ff9b:1:ffff::{0}",
    "::1:{0}",
    "100::{0}",
    "5f00::{0}",
    "ff0e::{0}",
    "4000::{0}",
)


@pytest.mark.parametrize("form", FORMS)
def test_a_private_address_is_private_in_every_form(form: str) -> None:
    for address in INNER:
        number = int.from_bytes(map(int, address.split(".")))
        flipped = number ^ 0xFFFFFFFF  # as Teredo writes it
        words = [f"{n >> s & 0xFFFF:x}" for n in (number, flipped) for s in (16, 0)]
        assert not is_public(form.format(address, *words)), (form, address)


def test_addresses_that_nobody_on_the_internet_has_are_private() -> None:
    for address in (
        "fec0::1",
        "feff::1",
        "64:ff9b:1::1",
        "::8.8.8.8",
        "::ffff:0:8.8.8.8",
        "3fff::1",
        "2001:2::1",
        "2001:10::1",
        "2001:db8::1",
        "1::1",
        "6000::1",
        "::",
        "192.0.0.9",
        "192.88.99.1",
        "198.18.0.1",
        "168.63.129.16",
        "100.100.100.200",
        "240.0.0.1",
        "fd00:ec2::254",
    ):
        assert not is_public(address), address


def test_the_internets_addresses_are_public_in_the_forms_that_lead_there() -> None:
    for address in (
        "8.8.8.8",
        "::ffff:8.8.8.8",
        "64:ff9b::8.8.8.8",
        "2606:4700::1111",
        "2a00:1450::1",
    ):
        assert is_public(address), address
