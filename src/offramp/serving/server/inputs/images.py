"""Images of requests: where they come from, and what is refused before anything is decoded."""

from __future__ import annotations

import base64
import binascii
import re
import stat
import threading
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from offramp.core.errors import DataError
from offramp.inputs.image import ImageTooLargeError, open_rgb
from offramp.serving.server.config import ImageLimits
from offramp.serving.server.errors import ApiError
from offramp.serving.server.inputs.fetch import Fetcher

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What is opened. Others are rare, and some of their readers start programs or read far more than
the file holds."""
_DATA = re.compile(r"data:([^,]{0,200}),", re.IGNORECASE)


def _scheme(url: str) -> str:
    return url[:8].partition(":")[0].lower()


def is_far(url: str) -> bool:
    """Return True if an image comes from another machine, which may be slow."""
    return _scheme(url) in ("http", "https")


def image_error(message: str, status: int = 400, code: str = "invalid_image") -> ApiError:
    return ApiError(status, message, param="image_url", code=code)


@dataclass(frozen=True)
class ImageSource:
    """Opens the images that requests name. Thread-safe; its methods block.

    smallest: as of `open_rgb`.
    """

    limits: ImageLimits
    fetcher: Fetcher
    smallest: int | None = None

    @classmethod
    def of(cls, limits: ImageLimits, smallest: int | None = None) -> ImageSource:
        return cls(limits, Fetcher(limits), smallest)

    def encoded(self, url: str, unwanted: threading.Event | None = None) -> bytes:
        """Return the file's bytes. unwanted: as of `Fetcher.fetch`. Raise `ApiError` where they
        cannot be fetched, or are too many."""
        if is_far(url):
            return self.fetcher.fetch(url, unwanted)
        scheme = _scheme(url)
        if scheme == "data":
            return self._from_data(url)
        if scheme == "file":
            return self._from_folder(url)
        raise image_error("An image must be a data URI (data:image/png;base64,...).")

    def decode(self, encoded: bytes) -> Image.Image:
        """Return the image as 8-bit RGB. Raise `ApiError` for a file that is no image, or whose
        header has too large a size."""
        try:
            return open_rgb(
                encoded,
                "The image",
                pixels=self.limits.pixels,
                formats=FORMATS,
                smallest=self.smallest,
            )
        except ImageTooLargeError as error:
            raise image_error(
                f"The image is larger than the {self.limits.pixels} pixels allowed. Shrink it.",
                413,
                "image_too_large",
            ) from error
        except DataError as error:
            if isinstance(error.__cause__, UnidentifiedImageError):
                said = f"The image is not readable; known formats: {', '.join(FORMATS)}."
                raise image_error(said) from error
            raise image_error(error.problem) from error

    def _from_data(self, url: str) -> bytes:
        match = _DATA.match(url)
        if match is None or not match[1].lower().rstrip().endswith("base64"):
            raise image_error("A data URI must be in base64: data:image/png;base64,...")
        most = self.limits.bytes
        if (len(url) - match.end()) * 3 // 4 > most + 1024:
            raise self._too_many_bytes()
        text = url[match.end() :]
        if "%" in text:
            text = urllib.parse.unquote(text)
        text = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
        try:
            data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
        except (binascii.Error, ValueError) as error:
            raise image_error("The data URI is not whole base64.") from error
        if len(data) > most:
            raise self._too_many_bytes()
        return data

    def _from_folder(self, url: str) -> bytes:
        folder = self.limits.folder
        if folder is None:
            raise image_error("This server reads no files. Send the image as a data URI.", 403)
        parts = urllib.parse.urlsplit(url)
        try:
            path = Path(urllib.parse.unquote(parts.path)).resolve()
            inside = path.is_relative_to(folder.resolve()) and parts.netloc in ("", "localhost")
            # One answer for what lies outside and what is missing: it shows nothing of the machine.
            if not inside or not stat.S_ISREG(path.stat().st_mode):
                raise OSError("not a file of the folder")
            with path.open("rb") as file:
                encoded = file.read(self.limits.bytes + 1)  # it may have grown
        except (OSError, RuntimeError, ValueError) as error:  # loops of links are a RuntimeError
            raise image_error("There is no such image in the server's folder.", 404) from error
        if len(encoded) > self.limits.bytes:
            raise self._too_many_bytes()
        return encoded

    def _too_many_bytes(self) -> ApiError:
        return image_error(
            f"An image is larger than the {self.limits.bytes} bytes allowed. Shrink it.",
            413,
            "image_too_large",
        )
