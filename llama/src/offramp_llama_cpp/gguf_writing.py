"""Metadata and tensors into a GGUF file."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.core.errors import InputError, did_you_mean
from offramp_llama_cpp.graphs import Array
from offramp_llama_cpp.packages import import_gguf, import_llama_cpp

FORMATS = (
    "f32",
    "f16",
    "bf16",
    "q8_0",
    "q6_k",
    "q5_k",
    "q5_1",
    "q5_0",
    "q4_k",
    "q4_1",
    "q4_0",
    "iq4_nl",
)
"""Number formats of the weights, by llama.cpp's names."""
VISION_FORMATS = ("f32", "f16", "q8_0", "q4_0")
"""Those of vision towers."""

_BLOCK, _SUPER_BLOCK = 32, 256
"""Weights of a row that share a scale, and in K-quants scales of scales; rows of another width stay
in f16."""
_NARROW = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""What K-quants are where a row is no multiple of 256 wide, as llama.cpp has it."""
_FITTED = ("iq4_nl", "q4_k", "q5_k", "q6_k")
"""Formats that llama.cpp writes, and the package gguf does not."""


def check_format(kind: str) -> None:
    """Raise `InputError` for a format that is not in `FORMATS`."""
    if kind not in FORMATS:
        raise InputError(f"GGUF format {kind!r} is not known.", did_you_mean(kind, FORMATS))


@contextmanager
def new_file(file: Path, architecture: str) -> Iterator[Any]:
    """Yield what takes the metadata and tensors of a file, which is written at the end."""
    out = import_gguf().GGUFWriter(file, architecture)
    try:
        yield out
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
    finally:
        out.close()


def add_value(out: Any, key: str, value: Any) -> None:
    """Add one key of the metadata."""
    add = {
        bool: out.add_bool,
        int: out.add_uint32,
        float: out.add_float32,
        str: out.add_string,
        list: out.add_array,
    }
    add[type(value)](key, value)


def add_array(out: Any, name: str, array: Array, kind: str) -> None:
    """One tensor [..., N] in the format `kind`, or the nearest that its width allows; a router's
    weights are few, and choose experts."""
    data, number = _quantised(array, "f32" if name.endswith("ffn_gate_inp.weight") else kind)
    out.add_tensor(name, data, raw_dtype=number)


def rounded(array: Array, kind: str) -> Array:
    """Return what a tensor [..., N] is after `add_array`, as floats."""
    data, number = _quantised(array, kind)
    return np.asarray(import_gguf().quants.dequantize(data, number), np.float32)


def _quantised(array: Array, kind: str) -> tuple[npt.NDArray[Any], Any]:
    """A tensor in the format `kind`, or the nearest that its width allows, and which that is."""
    gguf = import_gguf()
    if array.ndim == 1:
        kind = "f32"
    elif kind in _NARROW and array.shape[-1] % _SUPER_BLOCK:
        kind = _NARROW[kind]
    if kind.startswith(("q", "iq")) and array.shape[-1] % _BLOCK:
        kind = "f16"
    number = gguf.GGMLQuantizationType[kind.upper()]
    return (_fitted if kind in _FITTED else gguf.quants.quantize)(array, number), number


def _fitted(array: npt.NDArray[np.float32], number: int) -> npt.NDArray[np.uint8]:
    """Rows [..., N] as bytes, in a format whose scales llama.cpp fits. number: of the format."""
    rows = np.ascontiguousarray(array.reshape(-1, array.shape[-1]), dtype=np.float32)
    block, size = import_gguf().GGML_QUANT_SIZES[number]
    data = np.empty((len(rows), rows.shape[1] // block * size), dtype=np.uint8)
    quantize = import_llama_cpp().llama_cpp._lib.ggml_quantize_chunk
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, pointer, pointer, whole, whole, whole, pointer]
    written = quantize(number, rows.ctypes.data, data.ctypes.data, 0, *rows.shape, None)
    assert written == data.nbytes, "blocks are as large as they are said to be"
    return data.reshape(*array.shape[:-1], -1)
