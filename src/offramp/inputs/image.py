"""An image as pixels: opened upright in 8-bit RGB, refused where it cannot be, and its digests.

Of an encoded image only what its pixels are made of is decoded (`offramp.inputs.image_parts`),
so that it costs no more than they do, whoever wrote the file.
"""

import contextlib
import hashlib
import io
import os
import stat
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from offramp.core.errors import DataError
from offramp.core.storage import digest_file
from offramp.inputs.image_parts import PixelParts, TooCostly, orientation, pixel_parts


class EncodedImage(Protocol):
    """An image file inside another file, such as a cell of a data set."""

    def read(self) -> bytes:
        """Return the encoded image, as a file of its own would hold it."""
        ...


SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def image_names(folder: Path) -> list[str]:
    """Return the images in a folder and below, sorted, as paths from that folder."""
    # Not folders or pipes of such a name.
    files = (
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and os.path.isfile(path)
    )
    return sorted(path.relative_to(folder).as_posix() for path in files)


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""What is opened. Others are rare, and some of their readers start programs or read far more than
the file holds."""
LARGEST = 2**30
"""Bytes of an encoded image."""


class ImageTooLargeError(DataError):
    """An image has more pixels than may be decoded."""


def open_rgb(
    image: Path | Image.Image | EncodedImage | bytes,
    name: str,
    *,
    pixels: int | None = None,
    formats: Sequence[str] = FORMATS,
    smallest: int | None = None,
) -> Image.Image:
    """Return an image as 8-bit RGB: upright (EXIF), alpha over white, 16 bits scaled to 8.

    name: for error messages. pixels: the most that may be decoded (default: Pillow's
    `MAX_IMAGE_PIXELS`). formats: allowed ones. smallest: pixels a side to which a JPEG may be
    reduced while it is decoded, at a half, a quarter or an eighth; None: full size.

    Raises:
        ImageTooLargeError: it has more pixels.
        DataError: the image is missing, damaged, of another format or of a kind without an agreed
            range, such as floating point; or the file needs more work than its pixels justify.
    """
    most = Image.MAX_IMAGE_PIXELS if pixels is None else pixels
    try:
        if isinstance(image, Image.Image):
            encoded = _unread(image)
            if encoded is None:
                parts = PixelParts(b"", _noted_orientation(image))
                return _to_rgb(image, name, most, parts, None)
        else:
            encoded = image if isinstance(image, bytes) else _encoded(image, name)
        parts = pixel_parts(encoded)
        del encoded  # as large as the file
        with warnings.catch_warnings():
            # `_to_rgb` refuses at this limit, where Pillow only warns.
            warnings.simplefilter("ignore")
            picture = Image.open(io.BytesIO(parts.content), formats=_known(formats))
        with picture:
            return _to_rgb(picture, name, most, parts, smallest)
    except DataError:
        raise
    except TooCostly as error:
        raise DataError(
            f"{name} has {error}: it would take longer to decode than any image needs.",
            "Save it again as a plain JPEG or PNG.",
        ) from error
    except Image.DecompressionBombError as error:
        raise _too_large(name, most) from error
    except FileNotFoundError as error:
        raise DataError(f"{name} does not exist.", "Correct the path.") from error
    except Exception as error:  # decoders of damaged files raise nearly every builtin
        unknown = isinstance(error, UnidentifiedImageError)
        said = f"unknown format; known formats: {', '.join(formats)}" if unknown else error
        raise DataError(
            f"{name} is not a readable image: {said}.",
            "Replace the file with a whole copy, or remove its rows from the data.",
        ) from error


def _encoded(image: Path | EncodedImage, name: str) -> bytes:
    if not isinstance(image, Path):
        return image.read()
    status = os.stat(image)
    if not stat.S_ISREG(status.st_mode):
        # A pipe would keep its reader waiting for ever.
        raise DataError(f"{name} is not a file.", "Give the path of an image file.")
    if status.st_size > LARGEST:
        raise DataError(
            f"{name} has {status.st_size} bytes, and images of up to {LARGEST} are read.",
            "Save it again as a JPEG or PNG.",
        )
    return image.read_bytes()


def _unread(image: Image.Image) -> bytes | None:
    """The file of an opened image whose pixels nobody has read yet; None: they are in memory."""
    file = getattr(image, "fp", None)
    if not isinstance(image, ImageFile.ImageFile) or file is None or image.tell():
        return None
    if not image.tile and image.format != "WEBP":
        return None
    try:
        place = file.tell()
        file.seek(0)
        encoded = bytes(file.read())
        file.seek(place)
    except (AttributeError, OSError, ValueError):  # closed, or a stream that does not go back
        return None
    return encoded or None


def _noted_orientation(image: Image.Image) -> int:
    """The orientation that an image in memory was read with."""
    known = image.info.get("exif", b""), image.info.get("xmp", b"")
    exif, xmp = (value if isinstance(value, bytes) else b"" for value in known)
    return orientation(exif, xmp)


def _known(formats: Sequence[str]) -> list[str]:
    """Those of `formats` that this Pillow has."""
    Image.init()
    return [name for name in formats if name in Image.OPEN]


def content_digest(image: Path | Image.Image | EncodedImage) -> str:
    """Return the SHA-256 of an image: of its file's bytes, or of its pixels if it has no file.

    Raises:
        StorageError: the file cannot be read.
    """
    if isinstance(image, Path):
        return digest_file(image)
    if isinstance(image, Image.Image):
        return _hash(f"{image.mode} {image.size} ".encode() + image.tobytes())
    return _hash(image.read())


def pixel_digest(image: Image.Image) -> str:
    """Return the SHA-256 of the visible image: size and pixels of upright 8-bit RGB, as by
    `open_rgb`.

    Compression, metadata, the orientation tag and the kind of source do not count.
    """
    return _hash(f"{image.size} ".encode() + image.tobytes())


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _to_rgb(
    picture: Image.Image, name: str, most: int | None, parts: PixelParts, smallest: int | None
) -> Image.Image:
    if most is not None and picture.width * picture.height > most:
        raise _too_large(name, most, picture.size)
    if smallest is not None:
        picture.draft(None, (smallest, smallest))  # what no JPEG is stays as it is
    picture.load()
    if parts.turned:
        with contextlib.suppress(Exception):  # broken EXIF says nothing against the pixels
            picture = ImageOps.exif_transpose(picture)
    elif parts.orientation in _TURNS:
        picture = picture.transpose(_TURNS[parts.orientation])
    if picture.mode == "F":
        raise _no_range(name, "floating-point pixels")
    if picture.mode.startswith("I"):
        return _from_16_bits(picture, name)
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    # A copy of a camera's pixels would take half as long as their decoding.
    return picture if parts.content and picture.mode == "RGB" else picture.convert("RGB")


def _from_16_bits(picture: Image.Image, name: str) -> Image.Image:
    """Scale 0..65535 to 0..255, rounded; Pillow's own conversion clips at 255."""
    pixels = np.asarray(picture).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise _no_range(name, "pixels of more than 16 bits")
    return Image.fromarray(((pixels + 128) // 257).astype(np.uint8)).convert("RGB")


def _no_range(name: str, what: str) -> DataError:
    return DataError(
        f"{name} has {what}, whose black and white are not known.",
        "Save it with 8 or 16 bits a channel.",
    )


def _too_large(
    name: str, most: int | None, size: tuple[int, int] | None = None
) -> ImageTooLargeError:
    shape = f" ({size[0]} x {size[1]})" if size else ""
    return ImageTooLargeError(
        f"{name} has more than {most} pixels{shape}.",
        "Shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust where it comes from.",
    )


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
