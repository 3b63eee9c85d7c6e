"""The images that a command line names: files, folders, addresses, and `-` for stdin."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from offramp.cli.parser import path_word
from offramp.core.errors import DataError

ADDRESS = ("http://", "https://")
SECONDS = 20
"""How long an address may be silent."""


class Fetched:
    """An image at an address, fetched on first use."""

    def __init__(self, address: str) -> None:
        self.address = address

    def __str__(self) -> str:
        return self.address

    def read(self) -> bytes:
        """Return the image file. Raise `DataError` if it cannot be fetched."""
        return self._content

    @cached_property
    def _content(self) -> bytes:
        from http.client import HTTPException
        from urllib.request import Request, urlopen

        from offramp.inputs.image import LARGEST

        asked = Request(self.address, headers={"User-Agent": "offramp"})
        try:
            with urlopen(asked, timeout=SECONDS) as reply:
                content: bytes = reply.read(LARGEST + 1)
        except (OSError, ValueError, HTTPException) as error:
            said = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(
                f"{self.address} cannot be fetched: {said}.",
                "Correct the address, or save the image and name its file.",
            ) from error
        if len(content) > LARGEST:
            raise DataError(
                f"{self.address} is larger than {LARGEST} bytes.", "Name an image of usual size."
            )
        return content


class Piped:
    """An image file on stdin, read on first use."""

    def __str__(self) -> str:
        return "-"

    def read(self) -> bytes:
        """Return the image file. Raise `DataError` if nothing can be read."""
        return self._content

    @cached_property
    def _content(self) -> bytes:
        try:
            content: bytes = sys.stdin.buffer.read()
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(f"stdin cannot be read: {error}.", "Name a file.") from error
        if not content:
            raise DataError("No image came on stdin.", "Send a file: offramp caption - < dog.jpg")
        return content


def picture(word: str) -> Any:
    """Return the image or folder that a word names; a type of options."""
    if word == "-":
        return Piped()
    return Fetched(word) if word.lower().startswith(ADDRESS) else path_word(word)


def unfolded(pictures: Sequence[Any]) -> Iterator[Any]:
    """Yield the images, with those in a folder in the folder's place. Raise `DataError` for a
    folder without images."""
    from offramp.inputs.image import image_names

    for one in pictures:
        if not (isinstance(one, Path) and one.is_dir()):
            yield one
            continue
        names = image_names(one)
        if not names:
            raise DataError(f"The folder {one} holds no images.", "Name one that does, or a file.")
        yield from (one / name for name in names)
