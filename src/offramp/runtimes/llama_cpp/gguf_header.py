"""The header of a GGUF file: what is said by key, and where tensors lie.

The package gguf reads every word of a vocabulary as an object of its own, which takes seconds for a
file from the hub; what is asked here, whenever files are loaded, are a few keys and one tensor.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offramp.runtimes.llama_cpp.packages import import_gguf

_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_LONGEST, _FEW = 1 << 16, 64
"""Numbers and words of an array that is read; a vocabulary is skipped."""


@dataclass(frozen=True)
class TensorPlace:
    """shape: rows last, as the file has it. kind: its number format's number. at: of its bytes."""

    shape: tuple[int, ...]
    kind: int
    at: int


@dataclass(frozen=True)
class Header:
    """said: by key; a longer array of words is left out. tensors: by name."""

    path: Path
    said: dict[str, Any]
    tensors: dict[str, TensorPlace]

    def rows(self, name: str) -> Any:
        """A tensor's rows [R, bytes] as they are stored, read when they are asked for."""
        place = self.tensors[name]
        block, size = import_gguf().GGML_QUANT_SIZES[place.kind]
        width, count = place.shape[0], int(np.prod(place.shape[1:], dtype=np.int64))
        shape = (count, width // block * size)
        return np.memmap(self.path, np.uint8, "r", offset=place.at, shape=shape)


def read_header(path: Path) -> Header:
    """Raise ValueError where the file is no whole GGUF file."""
    with path.open("rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise ValueError("it is empty") from error
        with data:
            try:
                return _Reader(data, path).read()
            except (struct.error, IndexError, OverflowError, UnicodeDecodeError) as error:
                raise ValueError("its header is cut off") from error


class _Reader:
    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._path = path
        self._at = 0

    def read(self) -> Header:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not start as one")
        self._at = 4
        version = self._number("I")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}")
        tensors, keys = self._number("Q"), self._number("Q")
        said: dict[str, Any] = {}
        for _ in range(keys):
            key = self._text()
            value = self._value(self._number("I"))
            if value is not None:
                said[key] = value
        places = {}
        for _ in range(tensors):
            name = self._text()
            shape = tuple(self._number("Q") for _ in range(self._number("I")))
            places[name] = shape, self._number("I"), self._number("Q")
        alignment = int(said.get("general.alignment", 32)) or 32
        start = -(-self._at // alignment) * alignment
        found = {n: TensorPlace(shape, kind, start + at) for n, (shape, kind, at) in places.items()}
        sizes = import_gguf().GGML_QUANT_SIZES
        for name, place in found.items():
            if place.kind not in sizes:
                raise ValueError(f"the tensor {name[:60]!r} is of the kind {place.kind}")
            block, size = sizes[place.kind]
            end = place.at + int(np.prod(place.shape, dtype=np.int64)) // block * size
            if end > len(self._data):
                raise ValueError(f"the tensor {name[:60]!r} is cut off")
        return Header(self._path, said, found)

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

    def _value(self, kind: int) -> Any:
        """None: an array that is not read."""
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            return self._number(_scalar(kind))
        inner, count = self._number("I"), self._number("Q")
        if inner == _STRING:
            if count <= _FEW:
                return [self._text() for _ in range(count)]
            self._skip(count)
            return None
        pattern = f"<{count}{_scalar(inner)}"
        size = struct.calcsize(f"<{_scalar(inner)}")
        if count * size > len(self._data) - self._at:
            raise IndexError
        self._at += count * size
        if count > _LONGEST:
            return None
        return list(struct.unpack_from(pattern, self._data, self._at - count * size))

    def _skip(self, count: int) -> None:
        data, at, unpack = self._data, self._at, struct.Struct("<Q").unpack_from
        for _ in range(count):
            at += 8 + unpack(data, at)[0]
        self._at = at


def _scalar(kind: int) -> str:
    """How `struct` calls a kind of number."""
    if kind not in _SCALARS:
        raise ValueError(f"a value has the kind {kind}")
    return _SCALARS[kind]
