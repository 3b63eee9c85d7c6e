"""Laws of images in requests: nothing is decoded, fetched or read that a limit forbids."""

from __future__ import annotations

import base64
import http.server
import io
import threading
import urllib.parse
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from offramp.serving.server.config import ImageLimits
from offramp.serving.server.errors import ApiError
from offramp.serving.server.inputs.fetch import Fetcher, is_public
from offramp.serving.server.inputs.images import ImageSource
from serving import data_uri

RED = Image.new("RGB", (6, 4), "red")


def source(**limits: Any) -> ImageSource:
    return ImageSource.of(ImageLimits(**limits))


def opened(source: ImageSource, url: str) -> Image.Image:
    return source.decode(source.encoded(url))


def encoded(image: Image.Image = RED, kind: str = "PNG", **more: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


# -- data URIs -------------------------------------------------------------------------------------

PLAIN = base64.b64encode(encoded()).decode()


@pytest.mark.parametrize(
    "uri",
    [
        f"data:image/png;base64,{PLAIN}",
        f"DATA:IMAGE/PNG;BASE64,{PLAIN}",
        f"data:image/png;charset=utf-8;base64,{PLAIN}",
        f"data:;base64,{PLAIN}",
        f"data:image/png;base64,{PLAIN.rstrip('=')}",
        f"data:image/png;base64,{PLAIN.replace('+', '-').replace('/', '_')}",
        f"data:image/png;base64,{urllib.parse.quote(PLAIN, safe='')}",
        "data:image/png;base64," + "\n".join(PLAIN[i : i + 20] for i in range(0, len(PLAIN), 20)),
    ],
)
def test_data_uris_are_read_as_clients_write_them(uri: str) -> None:
    assert opened(source(), uri).tobytes() == RED.tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_usual_formats_open(kind: str) -> None:
    assert opened(source(), data_uri(RED, kind)).size == RED.size


def bomb(side: int) -> bytes:
    """A PNG of a few kB that claims so many pixels a side."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + check

    size = side.to_bytes(4, "big")
    head = chunk(b"IHDR", size + size + bytes([8, 2, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(10_000_000)))


def uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


@pytest.mark.parametrize("side", [5_000, 30_000, 2**31 - 1])
def test_a_bomb_is_refused_by_its_header(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(ApiError, match="20000000 pixels allowed") as refused:
        opened(source(), uri(bomb(side)))
    assert (refused.value.status, refused.value.body["error"]["code"]) == (413, "image_too_large")


def test_too_many_bytes_are_refused_before_they_are_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("base64.b64decode", None)
    with pytest.raises(ApiError) as refused:
        opened(source(bytes=100), uri(bytes(5000)))
    assert refused.value.status == 413


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "EPS", "PDF"])
def test_formats_that_are_not_listed_are_not_opened(kind: str) -> None:
    with pytest.raises(ApiError, match="not readable"):
        opened(source(), uri(encoded(kind=kind)))


@pytest.mark.parametrize("where", [10, 40, -400])
def test_a_cut_image_is_the_clients_mistake(where: int) -> None:
    noise = Image.effect_noise((64, 64), 80).convert("RGB")
    with pytest.raises(ApiError) as refused:
        opened(source(), uri(encoded(noise)[:where]))
    assert refused.value.status == 400


# -- files -----------------------------------------------------------------------------------------


def test_a_folder_is_read_and_nothing_beside_it(tmp_path: Path) -> None:
    folder, outside = tmp_path / "in", tmp_path / "out.png"
    folder.mkdir()
    (folder / "a b.png").write_bytes(encoded())
    outside.write_bytes(encoded())
    (folder / "link.png").symlink_to(outside)
    (folder / "sub").mkdir()
    reads = source(folder=folder)
    quoted = urllib.parse.quote(str(folder / "a b.png"))
    assert opened(reads, f"file://{quoted}").size == RED.size
    wrong = (
        outside,
        folder / "link.png",
        folder / ".." / "out.png",
        folder / "sub",
        folder / "gone.png",
        Path("/etc/passwd"),
        Path("/dev/zero"),
        folder / "%00.png",
    )
    said = set()
    for path in wrong:
        with pytest.raises(ApiError) as refused:
            opened(reads, f"file://{path}")
        said.add(str(refused.value))
    assert len(said) == 1  # what is outside and what is missing look alike
    with pytest.raises(ApiError):
        opened(reads, f"file://elsewhere{quoted}")
    with pytest.raises(ApiError, match="reads no files"):
        opened(source(), f"file://{quoted}")


# -- the web ---------------------------------------------------------------------------------------

PRIVATE = (
    "127.0.0.1",
    "10.0.0.1",
    "172.16.3.4",
    "192.168.1.1",
    "169.254.169.254",
    "0.0.0.0",
    "100.64.0.1",
    "224.0.0.1",
    "255.255.255.255",
    "::1",
    "::",
    "fe80::1",
    "fe80::1%eth0",
    "fd00::1",
    "ff02::1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "64:ff9b::7f00:1",
    "2002:7f00:1::",
    "2001:0:7f00:1::1",
)


@pytest.mark.parametrize("address", PRIVATE)
def test_a_private_address_is_never_connected_to(address: str) -> None:
    assert not is_public(address)
    fetcher = Fetcher(ImageLimits(domains=("example.org",)), lambda *_: [address])
    with pytest.raises(ApiError, match="open internet"):
        fetcher.fetch("http://example.org/a.png")
    both = replace(fetcher, resolve=lambda *_: ["93.184.216.34", address])
    with pytest.raises(ApiError, match="open internet"):
        both.fetch("http://example.org/a.png")


def test_public_addresses_are_public() -> None:
    assert all(map(is_public, ("93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946")))


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org.evil.com/a",
        "http://evil.com/example.org",
        "http://notexample.org/",
        "http://example.org@evil.com/a",
        "http://evil.com#@example.org/",
        "http://127.0.0.1/",
        "http://user:pw@example.org/",
        "http:///a",
        "http://[::1]/",
        "http://exa mple.org/",
        "http://2130706433/",
        "http://0x7f.1/",
        "https://[bad",
        "http://example.org:99999/",
        "http://sub.example.org/",
        "http://example.org\\@evil.com/",
    ],
)
def test_only_allowed_hosts_are_asked_for(url: str) -> None:
    asked: list[str] = []

    def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"]

    with pytest.raises(ApiError):
        Fetcher(ImageLimits(domains=("example.org",)), resolve).fetch(url)
    assert asked == []


class Site(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path = urllib.parse.urlsplit(self.path).path
        self.server.asked.append(self.headers["Host"])  # type: ignore[attr-defined]
        if path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", urllib.parse.unquote(path[4:]))
            self.end_headers()
        elif path == "/gone":
            self.send_error(404)
        elif path == "/large":
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(bytes(1000))
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(encoded())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[Any]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.asked = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def fetcher(**limits: Any) -> Fetcher:
    """One that takes this machine for the web, apart from what is called private."""

    def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.2" if host.startswith("private") else "127.0.0.1"]

    settings = ImageLimits(domains=("example.org", "private.org", ".wide.org"), **limits)
    return Fetcher(settings, resolve, lambda address: address == "127.0.0.1")


def test_an_allowed_host_is_fetched_from_the_address_that_was_checked(site: Any) -> None:
    port = site.server_port
    for host in ("example.org", "EXAMPLE.org", "a.wide.org"):
        assert fetcher().fetch(f"http://{host}:{port}/a b?c=d e") == encoded()
        assert site.asked[-1].lower() == f"{host.lower()}:{port}"


def test_every_redirect_is_checked_again(site: Any) -> None:
    port = site.server_port
    to = urllib.parse.quote(f"http://a.wide.org:{port}/x", safe="")
    assert fetcher().fetch(f"http://example.org:{port}/to/{to}") == encoded()
    assert fetcher().fetch(f"http://example.org:{port}/to/%2Fother") == encoded()
    for bad in (
        f"http://evil.com:{port}/",
        f"http://private.org:{port}/",
        "file:///etc/passwd",
        f"http://127.0.0.1:{port}/",
        "gopher://example.org/",
        "",
    ):
        before = len(site.asked)
        with pytest.raises(ApiError):
            fetcher(redirects=1).fetch(
                f"http://example.org:{port}/to/" + urllib.parse.quote(bad, safe="")
            )
        # Nothing but the first address was asked, or itself again where the redirect was empty.
        assert all(host.startswith("example.org") for host in site.asked[before:])
    loop = "http://example.org:{0}/to/%2Fto%2F%252Fto%252F%25252Fto%25252F%2525252Fx"
    with pytest.raises(ApiError, match="redirects more than"):
        fetcher().fetch(loop.format(port))


def test_what_is_too_large_or_missing_is_refused(site: Any) -> None:
    for path, status in (("/large", 413), ("/gone", 400)):
        with pytest.raises(ApiError) as refused:
            fetcher(bytes=50_000).fetch(f"http://example.org:{site.server_port}{path}")
        assert refused.value.status == status
    with pytest.raises(ApiError, match="could not be fetched"):
        fetcher().fetch("http://example.org:9/")
