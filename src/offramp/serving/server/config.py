"""What a server allows, and for how long."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from offramp.common.options import option
from offramp.core.decoding.policy import MODES
from offramp.core.errors import InputError

MIB = 2**20
KEYS = "OFFRAMP_API_KEYS"
"""Variable of the keys that requests give."""
_ORIGIN = re.compile(r"\*|https?://[^/\s?#@]+/?")


@dataclass(frozen=True)
class ImageLimits:
    """Limits on a request's images; bytes and pixels are checked before anything is decoded.

    seconds: of a fetch. redirects: that are followed, each checked like the first address.

    Raises:
        InputError: a number that is not above 0 and finite, or a path that is no folder.
    """

    count: int = option(8, "images of one request")
    bytes: int = option(10 * MIB, "bytes of an encoded image")
    pixels: int = option(20_000_000, "pixels of an image")
    domains: Sequence[str] = option(
        (),
        "hosts that images are fetched from; .example.org: all below it too",
        flag="--image-domains",
        metavar="HOST",
    )
    folder: Path | None = option(
        None, "folder whose images file:// may name", flag="--image-folder", metavar="FOLDER"
    )
    seconds: float = 10.0
    redirects: int = 3

    def __post_init__(self) -> None:
        _check_positive(self, ("count", "bytes", "pixels", "seconds"))
        if self.folder is not None and not self.folder.is_dir():
            raise InputError(
                f"Images cannot be read from {self.folder}: it is no folder.",
                "Name the folder whose images requests may ask about.",
            )


@dataclass(frozen=True)
class ServerConfig:
    """Settings of a server.

    name: of the model, in requests and answers. keys: any of them opens everything but `/health`
    and `/ready`; none: everything is open. hosts: allowed names in the `Host` header, so that no
    page of another site reaches the server by another name; ".example.org": all names below it too,
    "*": any; the address of the connection is always allowed; none: any. body, messages,
    characters: bytes of a request, its messages, and characters of its text. schema: characters of
    a JSON schema. bodies: bytes of all current requests. choices: answers to one request (`n`, and
    prompts of a completion). default_tokens: longest answer, if neither the request nor the model
    sets one. body_seconds: for a request's header, and then for its body, to arrive. send_seconds:
    that a client may leave sent data unread. connections: open at once; a further one replaces the
    one that was idle for the longest time.

    Raises:
        InputError: a number that is not above 0 and finite, or an invalid origin or key.
    """

    name: str
    keys: Sequence[str] = field(default=(), repr=False)
    hosts: Sequence[str] = ()
    cors: Sequence[str] = option(
        (),
        "origins whose pages may ask from a browser, such as https://example.org; '*': any",
        metavar="ORIGIN",
        shown="none",
    )
    queue: int = option(64, "requests that may wait; more are refused")
    body: int = 32 * MIB
    bodies: int = 1024 * MIB
    messages: int = 256
    characters: int = 400_000
    schema: int = 65_536
    choices: int = 16
    default_tokens: int = 256
    seconds: float = option(300.0, "seconds that an answer may take", flag="--timeout")
    body_seconds: float = 30.0
    send_seconds: float = 30.0
    connections: int = 512
    drain_seconds: float = option(
        30.0, "seconds for answers under way after SIGTERM", flag="--drain"
    )
    mode: str | None = option(
        None, "mode of requests that name none", choices=MODES, shown="the adapter's policy"
    )
    unlike: str = option(
        "early_exit",
        "answers to requests unlike the calibrated ones: lossless answers those again that came "
        "whole, and all once the alarm is raised",
        choices=("early_exit", "lossless"),
    )
    images: ImageLimits = field(default_factory=ImageLimits)

    def __post_init__(self) -> None:
        names = ("queue", "body", "bodies", "messages", "characters", "schema", "choices")
        seconds = ("seconds", "body_seconds", "send_seconds", "drain_seconds")
        _check_positive(self, (*names, "default_tokens", "connections", *seconds))
        if wrong := [origin for origin in self.cors if not _ORIGIN.fullmatch(origin)]:
            raise InputError(
                f"{wrong[0]!r} is no origin of a page.",
                "Give a scheme and a host, with a port where it has one: https://example.org.",
            )
        if any(not key.strip() for key in self.keys):
            raise InputError("An API key is empty.", "Leave it out, or give a secret.")
        if any(not key.isprintable() for key in self.keys):
            raise InputError(
                "An API key holds a character that no header can.",
                "Write keys as plain text in UTF-8, one a line.",
            )


def is_among(host: str, names: Sequence[str]) -> bool:
    """Return True if a host, in lower case, is one of `names`, or lies below one that begins with a
    dot."""
    lower = [name.lower() for name in names]
    return any(host == name or (name.startswith(".") and host.endswith(name)) for name in lower)


def _check_positive(config: object, names: Sequence[str]) -> None:
    values = {name: getattr(config, name) for name in names}
    wrong = {name: value for name, value in values.items() if not 0 < value < math.inf}
    if wrong:
        raise InputError(
            f"The server cannot run with {', '.join(f'{n}={v!r}' for n, v in wrong.items())}.",
            "Give finite numbers above 0.",
        )


def keys_of_environment() -> tuple[str, ...]:
    """Return the keys in the variable `KEYS`, separated by commas; none where it is not set.

    Raises:
        InputError: it is set, and holds none.
    """
    given = os.environ.get(KEYS)
    if given is None:
        return ()
    found = tuple(key.strip() for key in given.replace(",", "\n").splitlines() if key.strip())
    if not found:
        raise InputError(
            f"The variable {KEYS} is set, and holds no key.",
            "Give keys with commas between, or unset it to serve without.",
        )
    return found
