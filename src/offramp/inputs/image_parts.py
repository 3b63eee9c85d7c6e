"""What of an image file its pixels are made of, cut out before a decoder sees the rest.

A decoder works for every scan, chunk, comment and tag that a file declares, and a few bytes may
declare work for minutes. So the parts that no pixel depends on are left out (comments, profiles,
EXIF but for the orientation, all frames but the first), and what is left is counted: it costs no
more than the pixels do. Files that are damaged pass; the decoder says what is wrong with them.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

SEGMENTS = 4096
"""Of a JPEG's header, and extensions before a GIF's first frame."""
SCANS = 100
"""Of a JPEG; encoders write up to 20, and libjpeg's own tools and libtiff stop at 100 too."""
USUAL_SCANS = 20
SCANNED_PIXELS = 2**29
"""Scans times pixels beyond the usual scans: each scan goes through all pixels, empty or not."""
CHUNKS = 2**16
"""Of a PNG, before and with its pixels."""
STRIPS = 2**17
"""Of a TIFF."""
RUNS = 2**20
"""Pixels, and bytes, of a BMP that is run-length encoded: Pillow reads its runs in Python."""


class TooCostly(ValueError):
    """A file needs more work than its pixels justify; the text says why."""


@dataclass(frozen=True)
class PixelParts:
    """A file reduced to an image's pixels. orientation: EXIF's, 1 to 8; 1: upright.

    turned: whether the decoder itself turns the image upright.
    """

    content: bytes
    orientation: int = 1
    turned: bool = False


def pixel_parts(content: bytes) -> PixelParts:
    """Return the parts of an encoded image that its first frame needs.

    Raises:
        TooCostly: it has more scans, chunks, extensions, tags or strips than any encoder writes.
    """
    if content.startswith(b"\xff\xd8"):
        return _jpeg(content)
    if content.startswith(_PNG):
        return _png(content)
    if content.startswith((b"GIF87a", b"GIF89a")):
        return PixelParts(_gif(content))
    if content.startswith(b"BM"):
        _check_bmp(content)
    elif content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return PixelParts(content, _webp_orientation(content))
    elif content.startswith((b"II", b"MM")):
        _check_tiff(content)
        return PixelParts(content, turned=True)
    return PixelParts(content)


# -- JPEG ------------------------------------------------------------------------------------------

# A marker: not a stuffed byte, a fill byte, a restart or a TEM, which stand alone.
_MARKER = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd8])")
_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_NEEDED = _SIZES | {0xC4, 0xCC, 0xDB, 0xDD}  # frames, tables, the restart interval
_SCAN, _END = 0xDA, 0xD9


def _jpeg(content: bytes) -> PixelParts:
    kept, scans, pixels, first_scan, end = [b"\xff\xd8"], 0, 0, None, len(content)
    exif = xmp = b""
    for number, (code, begin, body) in enumerate(_jpeg_segments(content)):
        if number > SEGMENTS:
            raise TooCostly(f"more than {SEGMENTS} segments")
        if code == _END:
            end = begin + 2
            break
        data = content[body : body + _length(content, begin)]
        if code == _SCAN:
            scans += 1
            first_scan = begin if first_scan is None else first_scan
            _check_scans(scans, pixels)
        elif first_scan is not None:
            continue  # tables between scans stay where they are
        elif code in _NEEDED or (code, data[:4]) == (0xE0, b"JFIF") or code == 0xEE:
            kept.append(content[begin : body + len(data)])
            if code in _SIZES and len(data) >= 5 and not pixels:
                height, width = struct.unpack(">HH", data[1:5])
                pixels = height * width
        elif code == 0xE1 and data.startswith(b"Exif\0\0"):
            exif = exif or data[6:]
        elif code == 0xE1 and data.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            xmp = xmp or data
    if first_scan is None:
        return PixelParts(content[: 2**16])  # no pixels: the decoder says so
    return PixelParts(b"".join(kept) + content[first_scan:end], orientation(exif, xmp))


def _jpeg_segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, its place, and the place of its data: as libjpeg finds them."""
    at = 2
    while match := _MARKER.search(content, at):
        begin = match.start()
        yield match[1][0], begin, begin + 4
        at = begin + 4 + _length(content, begin)


def _length(content: bytes, begin: int) -> int:
    """Bytes of a segment's data."""
    return max(0, int.from_bytes(content[begin + 2 : begin + 4], "big") - 2)


def _check_scans(scans: int, pixels: int) -> None:
    allowed = max(USUAL_SCANS, min(SCANS, SCANNED_PIXELS // max(1, pixels)))
    if scans > allowed:
        raise TooCostly(f"more than {allowed} scans")


# -- PNG -------------------------------------------------------------------------------------------

_PNG = b"\x89PNG\r\n\x1a\n"
_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_MOST = {b"IHDR": 64, b"PLTE": 768, b"tRNS": 256}
_TURNING = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
"""Texts that may hold an orientation."""
_TEXT = 2**18
"""Bytes of such a text, compressed or not, that are read."""


def _png(content: bytes) -> PixelParts:
    kept, at, chunks, texts = [_PNG], len(_PNG), 0, 0
    exif = xmp = b""
    while at + 12 <= len(content):
        length, kind = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        end, data = at + 12 + length, memoryview(content)[at + 8 : at + 8 + length]
        chunks += 1
        if chunks > CHUNKS:
            raise TooCostly(f"more than {CHUNKS} chunks")
        if length > _MOST.get(kind, length):
            raise TooCostly(f"{length} bytes of {kind.decode()}")
        if kind in _PIXELS and (length or kind != b"IDAT"):
            kept.append(content[at:end])
        elif kind == b"eXIf":
            exif = exif or bytes(data)
        elif data[:24].tobytes().startswith(_TURNING) and length <= _TEXT and texts < 4:
            texts += 1
            found = _png_text(kind, bytes(data))
            exif, xmp = exif or found[0], xmp or found[1]
        if kind == b"IEND":
            break
        if kind[:1].isupper() and kind not in _PIXELS:  # critical and unknown
            return PixelParts(b"".join(kept) + content[at : at + 2**16])
        at = end
    else:
        kept.append(content[at : at + 12])  # what is cut off stays so
    return PixelParts(b"".join(kept), orientation(exif, xmp))


def _png_text(kind: bytes, data: bytes) -> tuple[bytes, bytes]:
    """EXIF that ImageMagick wrote as text, and XMP."""
    name, _, rest = data.partition(b"\0")
    if name == b"XML:com.adobe.xmp" and kind == b"iTXt":
        text = rest[2:].split(b"\0", 2)[-1]
        return b"", _inflated(text) if rest[:1] == b"\1" else text
    if name != b"Raw profile type exif" or kind == b"iTXt":
        return b"", b""
    text = _inflated(rest[1:]) if kind == b"zTXt" else rest
    try:
        exif = bytes.fromhex("".join(text.decode("ascii").split("\n")[3:]))
    except ValueError:
        return b"", b""
    return exif.removeprefix(b"Exif\0\0"), b""


def _inflated(data: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, _TEXT)
    except zlib.error:
        return b""


# -- GIF -------------------------------------------------------------------------------------------


_GIF_BLOCK = re.compile(rb"[!,;]")  # what stands before one is skipped by decoders too


def _gif(content: bytes) -> bytes:
    """The screen, the palette, the first frame and what controls it."""
    flags = content[10] if len(content) > 10 else 0
    at = 13 + (3 << (flags & 7) + 1 if flags & 128 else 0)
    kept, control, blocks = [content[:at]], b"", 0
    while (block := _GIF_BLOCK.search(content, at)) and block[0] == b"!":
        begin, at, size = block.start(), block.start() + 2, -1
        while at < len(content) and size:
            size = content[at]
            at += 1 + size
            blocks += 1
            if blocks > CHUNKS:
                raise TooCostly(f"more than {CHUNKS} blocks before its first frame")
        if content[begin + 1 : begin + 2] == b"\xf9":
            control = content[begin : min(at, begin + 8)]
    if len(control) == 8:
        kept.append(control)
    return b"".join([*kept, content[block.start() if block else len(content) :]])


# -- BMP, WebP, TIFF -------------------------------------------------------------------------------


def _check_bmp(content: bytes) -> None:
    if len(content) < 34 or content[14] < 40 or content[30] not in (1, 2):
        return
    width, height = struct.unpack_from("<ii", content, 18)
    if abs(width * height) > RUNS or len(content) > RUNS:
        raise TooCostly(f"run-length encoding and more than {RUNS} pixels or bytes")


def _webp_orientation(content: bytes) -> int:
    at, chunks, found = 12, 0, {b"EXIF": b"", b"XMP ": b""}
    while at + 8 <= len(content) and chunks < CHUNKS:
        kind, size = content[at : at + 4], int.from_bytes(content[at + 4 : at + 8], "little")
        if kind in found:
            found[kind] = content[at + 8 : at + 8 + size]
        at += 8 + size + size % 2
        chunks += 1
    return orientation(found[b"EXIF"].removeprefix(b"Exif\0\0"), found[b"XMP "])


_TIFF_BYTES = {2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_POINTERS = (34665, 34853, 40965)
"""Tags of further directories that Pillow reads."""


def _check_tiff(content: bytes) -> None:
    """Raise `TooCostly` where a TIFF's tags declare more bytes than the file has."""
    order = "<" if content.startswith(b"II") else ">"
    big = content[2:4] in (b"+\0", b"\0+")
    begin = _number(content, order, 8 if big else 4, 8 if big else 4)
    directories, declared = [begin], 0
    for seen, place in enumerate(directories):
        if seen > len(_POINTERS):
            break
        for tag, kind, count, value in _entries(content, order, place, big):
            declared += count * _TIFF_BYTES.get(kind, 1)
            if tag in (273, 324) and count > STRIPS:
                raise TooCostly(f"more than {STRIPS} strips")
            if tag in _POINTERS:
                directories.append(value)
        if declared > len(content):
            raise TooCostly("tags of more bytes than the file holds")


def _entries(
    content: bytes, order: str, place: int, big: bool
) -> Iterator[tuple[int, int, int, int]]:
    """Tag, type, count and value or place of a directory's entries."""
    head, size, word = (8, 20, 8) if big else (2, 12, 4)
    for index in range(min(_number(content, order, place, head), 2**16)):
        at = place + head + index * size
        if at + size > len(content):
            return
        yield (
            _number(content, order, at, 2),
            _number(content, order, at + 2, 2),
            _number(content, order, at + 4, word),
            _number(content, order, at + 4 + word, word),
        )


def _number(content: bytes, order: str, place: int, size: int) -> int:
    return int.from_bytes(content[place : place + size], "little" if order == "<" else "big")


# -- orientation -----------------------------------------------------------------------------------

_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')


def orientation(exif: bytes, xmp: bytes = b"") -> int:
    """Return the orientation, 1 to 8, from EXIF's or else XMP's bytes; 1 where they have none.

    Other tags are not read, because they may point to the same bytes again and again.
    """
    exif = exif.removeprefix(b"Exif\0\0")
    if exif[:4] in (b"II*\0", b"MM\0*"):
        order = "<" if exif.startswith(b"II") else ">"
        place = _number(exif, order, 4, 4)
        for number, (tag, kind, _, _) in enumerate(_entries(exif, order, place, False)):
            if tag == 274 and kind in (3, 4):
                found = _number(exif, order, place + 2 + number * 12 + 8, 2 if kind == 3 else 4)
                return found if 1 <= found <= 8 else 1
    match = _XMP_ORIENTATION.search(xmp)
    return int(match[1]) if match else 1
