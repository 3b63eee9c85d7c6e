"""An image as pixels: opened upright in 8-bit RGB, refused where it cannot be, and its digests."""

import contextlib
import hashlib
import io
import os
import stat
import warnings
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from offramp.errors import DataError
from offramp.storage import digest_file


class EncodedImage(Protocol):
    """An image file that is not a file of its own, such as a cell of a data set."""

    def read(self) -> bytes:
        """The encoded image, as its file would hold it."""
        ...


SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def image_names(folder: Path) -> list[str]:
    """The images in a folder and those below it, in order, as paths from there."""
    files = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return sorted(path.relative_to(folder).as_posix() for path in files)


def open_rgb(image: Path | Image.Image | EncodedImage, name: str) -> Image.Image:
    """An image as 8-bit RGB: upright (EXIF), alpha over white, 16 bits scaled to 8.

    name: what errors call it.

    Raises:
        DataError: the image is missing, damaged, too large (Pillow's `MAX_IMAGE_PIXELS`) or of a
            kind without an agreed range, such as floating point.
    """
    try:
        if isinstance(image, Image.Image):
            return _to_rgb(image, name)
        if isinstance(image, Path) and not stat.S_ISREG(os.stat(image).st_mode):
            # A pipe would keep its reader waiting for ever.
            raise DataError(f"{name} is not a file.", "Give the path of an image file.")
        source = image if isinstance(image, Path) else io.BytesIO(image.read())
        with warnings.catch_warnings():
            # `_to_rgb` refuses at this limit, where Pillow only warns.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(source)
        with picture:
            return _to_rgb(picture, name)
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(name) from error
    except FileNotFoundError as error:
        raise DataError(f"{name} does not exist.", "Correct the path in the data.") from error
    except Exception as error:  # decoders of damaged files raise nearly every builtin
        unknown = isinstance(error, UnidentifiedImageError)
        raise DataError(
            f"{name} is not a readable image: {'unknown format' if unknown else error}.",
            "Replace the file with a whole copy, or remove its rows from the data.",
        ) from error


def content_digest(image: Path | Image.Image | EncodedImage) -> str:
    """SHA-256 of an image: of its file's bytes, or of its pixels if it has no file.

    Raises:
        StorageError: the file cannot be read.
    """
    if isinstance(image, Path):
        return digest_file(image)
    if isinstance(image, Image.Image):
        return _hash(f"{image.mode} {image.size} ".encode() + image.tobytes())
    return _hash(image.read())


def pixel_digest(image: Image.Image) -> str:
    """SHA-256 of what is seen: size and pixels of upright 8-bit RGB, as `open_rgb` returns it.

    Compression, metadata and the orientation tag do not count, nor whether it came as a file.
    """
    return _hash(f"{image.size} ".encode() + image.tobytes())


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and picture.width * picture.height > limit:
        raise _too_large(name)
    picture.load()
    with contextlib.suppress(Exception):  # a broken EXIF block says nothing against the pixels
        picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F":
        raise _no_range(name, "floating-point pixels")
    if picture.mode.startswith("I"):
        return _from_16_bits(picture, name)
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")


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


def _too_large(name: str) -> DataError:
    return DataError(
        f"{name} has more than {Image.MAX_IMAGE_PIXELS} pixels.",
        "Shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust where it comes from.",
    )


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
