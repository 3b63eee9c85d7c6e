"""What a server allows, and for how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from offramp.errors import InputError

MIB = 2**20


@dataclass(frozen=True)
class ImageLimits:
    """What images a request may bring.

    count: in one request. bytes: of an encoded image. pixels: of a decoded one; both are checked
    before anything is decoded. domains: hosts that images are fetched from ("example.org" means it
    alone, ".example.org" what lies below it too); none by default. folder: of this machine, whose
    images `file://` may name. seconds: a fetch may take. redirects: that are followed, each checked
    as the first address was.

    Raises:
        InputError: a number below 1, a folder that is none.
    """

    count: int = 8
    bytes: int = 10 * MIB
    pixels: int = 20_000_000
    domains: Sequence[str] = ()
    folder: Path | None = None
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
    """How a server behaves.

    name: of the model, in requests and answers. keys: any of them opens everything but `/health`
    and `/ready`; none: everything is open. share_kept: whether prompts and images that are kept
    answer requests of other keys faster too, which tells these what was asked. hosts: names under
    which it is asked for (`Host`), so that no page of another site reaches it by a name of its own;
    ".example.org": all below it too, "*": any; the address that a connection came to always is one;
    none: any. queue: requests that may wait beside those in slots. body, messages, characters:
    bytes of a request, its messages, and its text. bodies: bytes of all requests under way.
    choices: answers to one request (`n`, and prompts of a completion).
    default_tokens: longest answer, where neither the request nor the model says one. seconds: from
    a request's arrival to the end of its answer. body_seconds: until a request's header, and then
    its body, has come. send_seconds: that a client may take nothing of what is sent to it.
    connections: open at once; a further one takes the place of the one that has asked for nothing
    for the longest time. drain_seconds: how long answers may take after SIGTERM. mode: of requests
    that name none; None: the adapter's policy. metrics: prefix of the metrics' names; `vllm` for
    dashboards that know these.

    Raises:
        InputError: a number below 1.
    """

    name: str
    keys: Sequence[str] = field(default=(), repr=False)
    share_kept: bool = False
    hosts: Sequence[str] = ()
    queue: int = 64
    body: int = 32 * MIB
    bodies: int = 1024 * MIB
    messages: int = 256
    characters: int = 400_000
    choices: int = 16
    default_tokens: int = 256
    seconds: float = 300.0
    body_seconds: float = 30.0
    send_seconds: float = 30.0
    connections: int = 512
    drain_seconds: float = 30.0
    mode: str | None = None
    metrics: str = "offramp"
    images: ImageLimits = field(default_factory=ImageLimits)

    def __post_init__(self) -> None:
        names = ("queue", "body", "bodies", "messages", "characters", "choices", "default_tokens")
        seconds = ("seconds", "body_seconds", "send_seconds", "drain_seconds")
        _check_positive(self, (*names, "connections", *seconds))
        if any(not key.strip() for key in self.keys):
            raise InputError("An API key is empty.", "Leave it out, or give a secret.")
        if any(not key.isprintable() for key in self.keys):
            raise InputError(
                "An API key holds a character that no header can.",
                "Write keys as plain text in UTF-8, one a line.",
            )


def _check_positive(config: object, names: Sequence[str]) -> None:
    wrong = {name: getattr(config, name) for name in names if not getattr(config, name) > 0}
    if wrong:
        raise InputError(
            f"The server cannot run with {', '.join(f'{n}={v!r}' for n, v in wrong.items())}.",
            "Give numbers above 0.",
        )
