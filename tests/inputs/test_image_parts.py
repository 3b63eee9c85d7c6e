"""Laws of what is decoded: the same pixels as of the whole file, and no work beside them."""

from __future__ import annotations

import io
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps
from scans import scans

from offramp.core.errors import DataError
from offramp.inputs.image import open_rgb
from offramp.inputs.image_parts import CHUNKS, SCANS, SEGMENTS, orientation, pixel_parts

NOISE = Image.effect_noise((61, 47), 90).convert("RGB")


def encoded(image: Image.Image = NOISE, kind: str = "PNG", **more: Any) -> bytes:
    buffer = io.BytesIO()
    if "append_images" in more:  # which keep what they were last saved with
        more["append_images"] = [frame.copy() for frame in more["append_images"]]
    image.copy().save(buffer, kind, **more)
    return buffer.getvalue()


def opened(content: bytes) -> Image.Image:
    return open_rgb(io.BytesIO(content), "The image")


def reference(content: bytes) -> Image.Image:
    """By Pillow alone."""
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")


def turned(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    exif[0x010E] = "a description " * 20
    return exif


CLEAR = NOISE.copy()
CLEAR.putalpha(Image.effect_noise(NOISE.size, 90))
PALETTE = NOISE.quantize(37)
FRAMES = [NOISE.rotate(angle) for angle in (10, 20, 30)]
SAME: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
    "jpeg": (NOISE, "JPEG", {}),
    "jpeg, progressive": (NOISE, "JPEG", {"progressive": True}),
    "jpeg, grey": (NOISE.convert("L"), "JPEG", {"optimize": True}),
    "jpeg, four colours": (NOISE.convert("CMYK"), "JPEG", {"progressive": True}),
    "jpeg, restarts": (NOISE, "JPEG", {"restart_marker_blocks": 1}),
    "jpeg, profile": (NOISE, "JPEG", {"icc_profile": bytes(200_000), "comment": b"c" * 999}),
    "jpeg, several": (NOISE, "MPO", {"save_all": True, "append_images": FRAMES}),
    "png": (NOISE, "PNG", {"icc_profile": bytes(999)}),
    "png, clear": (CLEAR, "PNG", {}),
    "png, palette": (PALETTE, "PNG", {"transparency": 3}),
    "png, 16 bits": (NOISE.convert("L").convert("I;16"), "PNG", {}),
    "png, one bit": (NOISE.convert("1"), "PNG", {}),
    "png, animated": (NOISE, "PNG", {"save_all": True, "append_images": FRAMES}),
    "gif": (PALETTE, "GIF", {"comment": b"c" * 999}),
    "gif, clear": (PALETTE, "GIF", {"transparency": 3}),
    "gif, animated": (PALETTE, "GIF", {"save_all": True, "append_images": FRAMES, "loop": 0}),
    "webp": (NOISE, "WEBP", {}),
    "webp, clear": (CLEAR, "WEBP", {"lossless": True}),
    "webp, animated": (NOISE, "WEBP", {"save_all": True, "append_images": FRAMES}),
    "bmp": (NOISE, "BMP", {}),
    "bmp, palette": (PALETTE, "BMP", {}),
    "tiff": (NOISE, "TIFF", {}),
    "tiff, packed": (NOISE, "TIFF", {"compression": "tiff_deflate"}),
    "tiff, as JPEG": (NOISE, "TIFF", {"compression": "jpeg"}),
    "tiff, several": (NOISE, "TIFF", {"save_all": True, "append_images": FRAMES}),
    "ppm": (NOISE, "PPM", {}),
}


@pytest.mark.parametrize("name", SAME)
def test_pixels_are_those_of_the_whole_file(name: str) -> None:
    picture, kind, options = SAME[name]
    content = encoded(picture, kind, **options)
    if "16 bits" not in name:  # which Pillow clips
        assert opened(content).tobytes() == reference(content).tobytes()
    assert len(pixel_parts(content).content) <= len(content)
    lazy = Image.open(io.BytesIO(content))  # as data sets hand images on
    assert open_rgb(lazy, "It").tobytes() == opened(content).tobytes()
    lazy = Image.open(io.BytesIO(content))
    lazy.load()
    assert open_rgb(lazy, "It").tobytes() == opened(content).tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("way", range(1, 9))
def test_images_stand_upright(kind: str, way: int) -> None:
    content = encoded(
        NOISE, kind, exif=turned(way), **({"lossless": True} if kind == "WEBP" else {})
    )
    assert opened(content).tobytes() == reference(content).tobytes()
    assert opened(content).size == (NOISE.size if way < 5 else NOISE.size[::-1])
    memory = Image.open(io.BytesIO(content))
    memory.load()
    assert open_rgb(memory, "It").tobytes() == reference(content).tobytes()


def test_xmp_turns_where_exif_does_not() -> None:
    xmp = b'<x:xmpmeta tiff:Orientation="6"/>'
    assert opened(encoded(NOISE, "JPEG", xmp=xmp)).size == NOISE.size[::-1]
    assert opened(encoded(NOISE, "WEBP", xmp=xmp)).size == NOISE.size[::-1]
    both = encoded(NOISE, "JPEG", xmp=xmp, exif=turned(3))
    assert opened(both).tobytes() == reference(both).tobytes()
    assert opened(both).size == NOISE.size


@pytest.mark.parametrize(
    "exif", [b"", b"II*\0", b"MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff"]
)
def test_broken_exif_turns_nothing(exif: bytes) -> None:
    assert orientation(exif) == orientation(b"Exif\0\0" + exif) == 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_damage_is_the_decoders_to_find(kind: str) -> None:
    """Cut or changed anywhere, a file is opened or refused in words, quickly."""
    content = encoded(NOISE, kind)
    begun = time.process_time()
    tried = 0
    for where in range(0, len(content), max(1, len(content) // 150)):
        changed = bytearray(content)
        changed[where] ^= 0xFF
        for bad in (content[:where], bytes(changed)):
            tried += 1
            try:
                assert opened(bad).mode == "RGB"
            except DataError as error:
                assert "The image" in error.problem
    assert tried > 200
    assert time.process_time() - begun < 20


# -- work without pixels ---------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    check = zlib.crc32(kind + data).to_bytes(4, "big")
    return len(data).to_bytes(4, "big") + kind + data + check


def before_pixels(parts: bytes) -> bytes:
    whole = encoded(NOISE.resize((8, 8)))
    place = whole.index(b"IDAT") - 4
    return whole[:place] + parts + whole[place:]


def overlapping(size: int) -> bytes:
    """EXIF, or a TIFF, of 65,535 tags of the same bytes."""
    tags = b"".join(struct.pack("<HHII", tag, 7, size - 9, 8) for tag in range(65_535))
    return (b"II*\0\x08\0\0\0\xff\xff" + tags).ljust(size, b"\0")


def jpeg(parts: bytes) -> bytes:
    whole = encoded(NOISE.resize((8, 8)), "JPEG")
    return whole[:2] + parts + whole[2:]


def gif(parts: bytes) -> bytes:
    whole = encoded(PALETTE, "GIF")
    place = 13 + (3 << (whole[10] & 7) + 1)
    return whole[:place] + parts + whole[place:]


def bmp(width: int, height: int, data: bytes) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(data), 0, 0, 256, 0)
    place = 14 + len(head) + 1024
    return b"BM" + struct.pack("<IHHI", place + len(data), 0, 0, place) + head + bytes(1024) + data


def strips(number: int) -> bytes:
    tags = [(256, 3, 1, 9), (257, 3, 1, 9), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    base = 14 + 12 * 8
    tags += [(273, 4, number, base), (278, 3, 1, 1), (279, 4, number, base + 4 * number)]
    rows = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0\x08\0\0\0\x08\0" + rows + bytes(4 + 8 * number + 999)


def exif_segments(exif: bytes) -> Iterator[bytes]:
    for start in range(0, len(exif), 60_000):
        part = b"Exif\0\0" + exif[start : start + 60_000]
        yield b"\xff\xe1" + struct.pack(">H", len(part) + 2) + part


MIB = 2**20
BOMB = zlib.compress(bytes(MIB))
REFUSED: dict[str, Callable[[], bytes]] = {
    "jpeg, scans": lambda: scans(SCANS),
    "jpeg, many pixels and scans": lambda: scans(40, (6000, 6000)),
    "jpeg, comments": lambda: jpeg(b"\xff\xfe\0\2" * 2_000_000),
    "jpeg, tables": lambda: jpeg(b"\xff\xdb\0\2" * (SEGMENTS + 1)),
    "png, chunks": lambda: before_pixels(chunk(b"tEXt", b"a\0b") * 400_000),
    "png, empty pixels": lambda: before_pixels(chunk(b"IDAT", b"") * (CHUNKS + 1)),
    "png, palette": lambda: before_pixels(chunk(b"PLTE", bytes(3 * MIB))),
    "gif, comments": lambda: gif(b"!\xfe" + b"\1a" * 4_000_000 + b"\0"),
    "gif, extensions": lambda: gif(b"!\xfe\0" * 2_000_000),
    "gif, controls": lambda: gif(b"!\xf9\x04\0\0\0\0\0" * 500_000),
    "bmp, a long line": lambda: bmp(19_000_000, 1, b"\1\1\0\0\0\1"),
    "bmp, jumps": lambda: bmp(19_000_000, 1, b"\0\2\0\xff" * 100),
    "bmp, runs": lambda: bmp(800, 800, b"\0\2\0\0" * 2_000_000 + b"\0\1"),
    "tiff, tags": lambda: overlapping(5_000_000),
    "tiff, strips": lambda: strips(500_000),
}
PROFILE = b"Raw profile type exif\0\0" + BOMB
OPENED: dict[str, Callable[[], bytes]] = {
    "jpeg, scans as encoders write": lambda: scans(10, (6000, 6000)),
    "jpeg, EXIF": lambda: jpeg(b"".join(exif_segments(overlapping(6_000_000)))),
    "jpeg, fill bytes": lambda: jpeg(b"\xff" * 9_000_000),
    "png, profiles": lambda: before_pixels(chunk(b"iCCP", b"a\0\0" + BOMB) * 9_000),
    "png, texts": lambda: before_pixels(chunk(b"zTXt", PROFILE) * 9_000),
    "png, EXIF": lambda: before_pixels(chunk(b"eXIf", overlapping(9_000_000))),
    "gif, what is between": lambda: gif(bytes(9_000_000)),
}
WITHIN = 1.5
"""CPU seconds; none takes a third of it on a machine with nothing else to do."""


@pytest.mark.parametrize("name", REFUSED)
def test_what_declares_more_work_than_its_pixels_is_refused(name: str, tmp_path: Path) -> None:
    content = REFUSED[name]()
    file = tmp_path / "x"
    file.write_bytes(content)
    begun = time.process_time()
    with pytest.raises(DataError, match=r"has more|has run-length|has tags of|has \d+ bytes of"):
        opened(content)
    with pytest.raises(DataError, match="longer to decode than any image needs"):
        open_rgb(file, "The image")  # as training reads it
    assert time.process_time() - begun < WITHIN


@pytest.mark.parametrize("name", OPENED)
def test_what_no_pixel_needs_is_not_read(name: str) -> None:
    content = OPENED[name]()
    begun = time.process_time()
    assert opened(content).mode == "RGB"
    assert time.process_time() - begun < WITHIN + ("encoders" in name)


def test_formats_that_start_programs_are_not_opened(tmp_path: Path) -> None:
    file = tmp_path / "x.eps"
    NOISE.save(file)
    with pytest.raises(DataError, match="known formats: JPEG"):
        open_rgb(file, "It")
