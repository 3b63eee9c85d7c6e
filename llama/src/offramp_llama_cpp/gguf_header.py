"""The header of a GGUF file: what is said by key, and where tensors lie.

The one reader of headers: what llama.cpp would refuse is refused here, and so is a file whose
tensors do not lie where their shapes say. The package gguf takes offsets as they come, and reads
every word of a vocabulary as an object of its own, which takes seconds for a file from the hub.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offramp_llama_cpp.packages import import_gguf

_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_LONGEST, _FEW = 1 << 16, 64
"""Numbers and words of an array that is read, unless all are asked for: a vocabulary is skipped."""
_MOST_AXES = 4
"""Of a tensor; llama.cpp has no more."""


@dataclass(frozen=True)
class TensorPlace:
    """shape: rows last, as the file has it. kind: its number format's number. at: of its bytes."""

    shape: tuple[int, ...]
    kind: int
    at: int


@dataclass(frozen=True)
class Header:
    """The header of a GGUF file. said: values by key; longer arrays of words are left out unless
    all were asked for. kinds: by key, the number of the value's type, and for an array that of its
    elements. tensors: by name."""

    path: Path
    said: dict[str, Any]
    kinds: dict[str, tuple[int, int | None]]
    tensors: dict[str, TensorPlace]

    def rows(self, name: str) -> Any:
        """A tensor's rows [R, bytes] as they are stored, read when they are asked for."""
        place = self.tensors[name]
        shape = (math.prod(place.shape[1:]), _bytes_of(place.kind, place.shape[:1]))
        return np.memmap(self.path, np.uint8, "r", offset=place.at, shape=shape)


def read_header(path: Path, *, whole: bool = False) -> Header:
    """Read the header of a file. whole: long arrays of numbers and words too.

    Raises:
        ValueError: it is no whole GGUF file, or its tensors overlap or leave gaps.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise ValueError("it is empty") from error
        with data:
            try:
                return _Reader(data, path, whole).read()
            except (struct.error, IndexError, OverflowError, UnicodeDecodeError) as error:
                raise ValueError("its header is cut off") from error


class _Reader:
    def __init__(self, data: mmap.mmap, path: Path, whole: bool) -> None:
        self._data, self._path = data, path
        self._longest, self._few = (len(data), len(data)) if whole else (_LONGEST, _FEW)
        self._at = 0

    def read(self) -> Header:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not start as one")
        self._at = 4
        version = self._number("I")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}")
        tensors, keys = self._number("Q"), self._number("Q")
        said, kinds = {}, {}
        names = set()
        for _ in range(keys):
            key = self._text()
            if key in names:
                raise ValueError(f"it says {key[:60]!r} twice")
            names.add(key)
            value, kind = self._value(self._number("I"))
            if value is not None:
                said[key], kinds[key] = value, kind
        return Header(self._path, said, kinds, self._tensors(tensors, said))

    def _tensors(self, count: int, said: Mapping[str, Any]) -> dict[str, TensorPlace]:
        """The tensors' places: each begins where the one before ends, as llama.cpp demands."""
        alignment = said.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"its alignment is {str(alignment)[:60]!r}")
        listed: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self._text()
            if name in listed:
                raise ValueError(f"it has the tensor {name[:60]!r} twice")
            axes = self._number("I")
            if axes > _MOST_AXES:
                raise ValueError(f"the tensor {name[:60]!r} has {axes} axes")
            shape = tuple(self._number("Q") for _ in range(axes))
            listed[name] = shape, self._number("I"), self._number("Q")
        start, end = _padded(self._at, alignment), 0
        found = {}
        for name, (shape, kind, offset) in listed.items():
            if offset != end:
                raise ValueError(f"the tensor {name[:60]!r} does not begin where the last one ends")
            size = _bytes_of(kind, shape, name)
            if start + offset + size > len(self._data):
                raise ValueError(f"the tensor {name[:60]!r} is cut off")
            found[name] = TensorPlace(shape, kind, start + offset)
            end = _padded(offset + size, alignment)
        return found

    def _number(self, kind: str) -> Any:
        (value,) = struct.unpack_from(f"<{kind}", self._data, self._at)
        self._at += struct.calcsize(f"<{kind}")
        return value

    def _text(self) -> str:
        length = self._number("Q")
        if length > len(self._data) - self._at:
            raise IndexError
        self._at += length
        return self._data[self._at - length : self._at].decode()

    def _value(self, kind: int) -> tuple[Any, tuple[int, int | None]]:
        """A value and its kinds; None: an array that is not read."""
        if kind == _STRING:
            return self._text(), (kind, None)
        if kind != _ARRAY:
            return self._number(_scalar(kind)), (kind, None)
        inner, count = self._number("I"), self._number("Q")
        kinds = (kind, inner)
        if inner == _STRING:
            if count <= self._few:
                return [self._text() for _ in range(count)], kinds
            self._skip(count)
            return None, kinds
        one = _scalar(inner)
        size = struct.calcsize(f"<{one}")
        if count * size > len(self._data) - self._at:
            raise IndexError
        self._at += count * size
        if count > self._longest:
            return None, kinds
        return [*struct.unpack_from(f"<{count}{one}", self._data, self._at - count * size)], kinds

    def _skip(self, count: int) -> None:
        data, at, unpack = self._data, self._at, struct.Struct("<Q").unpack_from
        for _ in range(count):
            at += 8 + unpack(data, at)[0]
        self._at = at


def _padded(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment


def _bytes_of(kind: int, shape: tuple[int, ...], name: str = "") -> int:
    """Bytes of a tensor. Raise `ValueError` for a kind that is not known, and for rows that are
    empty or that its blocks do not fill."""
    sizes = import_gguf().GGML_QUANT_SIZES
    if kind not in sizes:
        raise ValueError(f"the tensor {name[:60]!r} is of the kind {kind}")
    block, size = sizes[kind]
    if not all(shape) or not shape or shape[0] % block:
        raise ValueError(f"the tensor {name[:60]!r} has the shape {shape}")
    return int(math.prod(shape) // block * size)


def _scalar(kind: int) -> str:
    """How `struct` calls a kind of number."""
    if kind not in _SCALARS:
        raise ValueError(f"a value has the kind {kind}")
    return _SCALARS[kind]
