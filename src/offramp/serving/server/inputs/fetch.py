"""Images from the web: from allowed hosts alone, never from a private network.

A name is resolved once, all its addresses must be public, and the connection goes to the address
that was checked, so that a second answer of the name server changes nothing. A redirect is a new
address, checked in the same way. Proxies of the environment are not used. One deadline holds for
all of it: redirects, handshakes, headers and body. One that nobody wants any more ends before.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from offramp.serving.server.config import ImageLimits, is_among
from offramp.serving.server.errors import ApiError

Address = tuple[str, int]
_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 64 * 1024
_LOOK = 0.25
"""Seconds between looks whether what is waited for is still wanted."""


def is_public(address: str) -> bool:
    """Return True if an IP address is on the open internet; of IPv4 inside IPv6, the IPv4 address
    counts."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv4Address):
        return _public(ip) and not any(ip in network for network in _SPECIAL)
    inner = _inner(ip)
    if inner is not None and not is_public(str(inner)):
        return False
    if ip.ipv4_mapped or ip in _NAT64:
        return True
    return ip in _UNICAST and ip not in _DOCUMENTATION and _public(ip)


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_UNICAST = ipaddress.IPv6Network("2000::/3")
"""All that was ever given out; what lies outside is private, local or translated."""
_DOCUMENTATION = ipaddress.IPv6Network("3fff::/20")
_SPECIAL = [ipaddress.IPv4Network(n) for n in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16")]
"""Global by their numbers: assignments of protocols, relays, and a cloud's own service."""
_ISATAP = (0x00005EFE, 0x02005EFE)


def _inner(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 address leads to."""
    low = int(ip) & 0xFFFFFFFF
    if ip in _NAT64 or (int(ip) >> 32) & 0xFFFFFFFF in _ISATAP:
        return ipaddress.IPv4Address(low)
    return ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)


def _public(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return ip.is_global and not ip.is_multicast


def resolve(host: str, port: int) -> Sequence[str]:
    """Return all addresses of a host."""
    entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in entries))


def _refused(message: str, status: int = 403) -> ApiError:
    return ApiError(status, message, param="image_url", code="image_not_allowed")


@dataclass(frozen=True)
class Fetcher:
    """Fetches images from allowed hosts. resolve: returns a name's addresses. allowed: whether an
    address may be connected to."""

    limits: ImageLimits
    resolve: Callable[[str, int], Sequence[str]] = resolve
    allowed: Callable[[str], bool] = is_public

    def fetch(self, url: str, unwanted: threading.Event | None = None) -> bytes:
        """Return the body at `url`. Blocks. unwanted: set to abort. Raise `ApiError` where the
        fetch is forbidden, fails or is aborted."""
        until = _Until(time.monotonic() + self.limits.seconds, unwanted or threading.Event())
        for _ in range(self.limits.redirects + 1):
            answer = self._get(url, until)
            if isinstance(answer, bytes):
                return answer
            url = urllib.parse.urljoin(url, answer)
        raise _refused(f"The image's address redirects more than {self.limits.redirects} times.")

    def _get(self, url: str, until: _Until) -> bytes | str:
        """Return the body, or the address that it was moved to."""
        parts, host, port = self._checked(url)
        try:
            addresses = self.resolve(host, port)
        except (OSError, UnicodeError) as error:
            raise _refused("The image's host is not known.", 400) from error
        if not addresses or not all(map(self.allowed, addresses)):
            raise _refused("The image's host is not one of the open internet.")
        path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
        query = urllib.parse.quote(parts.query, safe="/?%:@!$&'()*+,;=~-._")
        target = path + (f"?{query}" if query else "")
        connection = _connection(parts.scheme, host, (addresses[0], port), until)
        try:
            connection.connect()
            connection.sock.until = until  # type: ignore[union-attr]
            connection.request(
                "GET", target, headers={"Accept": "image/*", "User-Agent": "offramp"}
            )
            response = connection.getresponse()
            if response.status in _REDIRECTS:
                return response.getheader("Location") or ""
            if response.status != 200:
                raise _refused(f"The image's host answered {response.status}.", 400)
            return self._body(response)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _refused("The image could not be fetched.", 400) from error
        finally:
            connection.close()

    def _checked(self, url: str) -> tuple[urllib.parse.SplitResult, str, int]:
        try:
            parts = urllib.parse.urlsplit(url)
            host, port = (parts.hostname or "").rstrip(".").lower(), parts.port
        except ValueError as error:
            raise _refused("The image's address is not one.", 400) from error
        if parts.scheme not in ("http", "https") or parts.username is not None or not host:
            raise _refused("The image's address is not one of http or https.", 400)
        if not is_among(host, self.limits.domains):
            raise _refused(
                "This server does not fetch images from there. Send the image as a data URI."
            )
        usual = 443 if parts.scheme == "https" else 80
        return parts, host, usual if port is None else port

    def _body(self, response: http.client.HTTPResponse) -> bytes:
        most, chunks, size = self.limits.bytes, [], 0
        declared = response.getheader("Content-Length", "0")
        if declared.isdecimal() and int(declared) > most:
            raise _refused(f"The image is larger than the {most} bytes allowed.", 413)
        while chunk := response.read1(_CHUNK):
            chunks.append(chunk)
            size += len(chunk)
            if size > most:
                raise _refused(f"The image is larger than the {most} bytes allowed.", 413)
        return b"".join(chunks)


@dataclass(frozen=True)
class _Until:
    """When a fetch is over: at `end`, or once it is `unwanted`."""

    end: float
    unwanted: threading.Event

    @property
    def left(self) -> float:
        """Return the seconds left. Raise `TimeoutError` where none are."""
        left = self.end - time.monotonic()
        if left <= 0 or self.unwanted.is_set():
            raise TimeoutError("the image took too long to come")
        return left


class _Timed:
    """A socket, plain or not, that is read as long as it may at most: however little comes at a
    time, in whichever part of an answer."""

    until: _Until | None = None

    def recv_into(self, *args: Any, **more: Any) -> int:
        while self.until is not None:
            self.settimeout(min(self.until.left, _LOOK))  # type: ignore[attr-defined]
            with contextlib.suppress(TimeoutError):
                return int(super().recv_into(*args, **more))  # type: ignore[misc]
        return int(super().recv_into(*args, **more))  # type: ignore[misc]


class _Plain(_Timed, socket.socket):
    pass


class _Secure(_Timed, ssl.SSLSocket):
    pass


def _connection(
    scheme: str, host: str, address: Address, until: _Until
) -> http.client.HTTPConnection:
    """A connection to an address that was checked, with the name of its host."""

    def connect(*_: object, **__: object) -> socket.socket:
        line = socket.create_connection(address, timeout=until.left)
        plain = _Plain(line.family, line.type, line.proto, fileno=line.detach())
        plain.settimeout(until.left)
        return plain

    if scheme == "https":
        context = ssl.create_default_context()
        context.sslsocket_class = _Secure
        secure = http.client.HTTPSConnection(host, address[1], context=context)
        secure._create_connection = connect  # type: ignore[attr-defined]
        return secure
    plain = http.client.HTTPConnection(host, address[1])
    plain._create_connection = connect  # type: ignore[attr-defined]
    return plain
