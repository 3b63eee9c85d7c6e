"""Reads a decoder layer's output out of llama.cpp while it computes.

llama.cpp asks a callback about every tensor of its graph: first whether it is wanted, then, once it
is computed, with its data. That is some 30 questions a layer, so a callback in Python costs more
than a small layer; one in C costs nothing that can be measured. Where it cannot be compiled, Python
answers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp_llama_cpp.native.compiling import compiled as compiled_library
from offramp_llama_cpp.native.products import Products

States = npt.NDArray[np.float32]


class _Tap(ctypes.Structure):
    _fields_ = (
        ("wanted", ctypes.c_char_p),
        ("name", ctypes.c_void_p),
        ("bytes", ctypes.c_void_p),
        ("get", ctypes.c_void_p),
        ("offer", ctypes.c_void_p),
        ("products", ctypes.c_void_p),
        ("into", ctypes.c_void_p),
        ("room", ctypes.c_size_t),
        ("held", ctypes.c_size_t),
        ("stop", ctypes.c_bool),
    )


class Tap:
    """The rows of one tensor, as the last call computed them.

    callback, user_data: what a llama.cpp context takes as `cb_eval`; the tap must outlive it.
    stop: end the call once the rows are there: nothing after them in the graph is computed.
    """

    def __init__(
        self,
        library: Any,
        tensor: str | None,
        width: int,
        rows: int,
        *,
        compiled: bool,
        products: Products | None = None,
    ) -> None:
        """library: with ggml's functions. tensor: its name; None: none is read. rows: most in one
        call.

        compiled: ask C where it can be compiled. products: take over what they can; in C alone.
        """
        self._into = np.empty((0 if tensor is None else rows, width), dtype=np.float32)
        functions = [library.ggml_get_name, library.ggml_nbytes, library.ggml_backend_tensor_get]
        addresses = [ctypes.cast(f, ctypes.c_void_p).value for f in functions]
        self._tap = _Tap(
            tensor and tensor.encode(),
            *addresses,
            products and products.offer,
            products and products.handle,
            self._into.ctypes.data,
            self._into.nbytes,
            0,
            False,
        )
        self.user_data: int = ctypes.addressof(self._tap)
        self._answer = _python_callback(library, self._tap)
        native = compiled_library("tap") if compiled else None
        self.compiled: bool = native is not None
        callback = self._answer if native is None else native.offramp_tap
        self.callback = ctypes.cast(callback, ctypes.c_void_p)

    @property
    def stop(self) -> bool:
        return bool(self._tap.stop)

    @stop.setter
    def stop(self, value: bool) -> None:
        self._tap.stop = value

    def clear(self) -> None:
        """Forget the rows of the call before."""
        self._tap.held = 0

    def rows(self) -> States:
        """The rows [n, D] since `clear`, a view that the next call overwrites.

        Empty where the graph holds no such tensor, or more rows than there is room for.
        """
        row = self._into.strides[0]
        count, partial_bytes = divmod(self._tap.held, row)
        return self._into[: 0 if partial_bytes or count > len(self._into) else count]


_Callback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)


def _python_callback(library: Any, tap: _Tap) -> Any:
    """The callback of the C source in Python, for machines without a compiler."""
    name: Callable[[int], bytes] = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)(tap.name)
    size: Callable[[int], int] = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_void_p)(tap.bytes)
    get = ctypes.CFUNCTYPE(
        None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t
    )(tap.get)
    wanted = tap.wanted

    def answer(tensor: int, ask: bool, _: int) -> bool:
        if ask:
            return bool(name(tensor) == wanted)
        if name(tensor) != wanted:
            return True
        count = size(tensor)
        if tap.held + count <= tap.room:
            get(tensor, tap.into + tap.held, 0, count)
        tap.held += count
        return not bool(tap.stop)

    return _Callback(answer)
