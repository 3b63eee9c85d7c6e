"""Products of weights and few tokens, and their attention, by kernels of our own: see products.c.

They want Linux on an x86 processor with AVX-512 VNNI or AVX2, a C compiler, ggml's header files,
which llama-cpp-python installs, and a build of llama.cpp for CPUs alone. Elsewhere llama.cpp
multiplies.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from typing import Any

from offramp_llama_cpp.native.compiling import compiled
from offramp_llama_cpp.native.recipe import INSTRUCTIONS
from offramp_llama_cpp.packages import headers

_OF_GGML = (
    "ggml_backend_buffer_is_host",
    "ggml_backend_buffer_get_usage",
    "ggml_init",
    "ggml_custom_4d",
    "ggml_free",
    "ggml_get_type_traits",
)


class Products:
    """The weights of one model as the kernels read them; each is packed when it is first used.

    offer: address of the function that a `Tap` hands every tensor of a graph to, with `handle`.
    """

    def __init__(self, library: Any) -> None:
        """library: with ggml's functions. Only where `reason_against` has none."""
        self._native = _native()
        addresses = [ctypes.cast(getattr(library, name), ctypes.c_void_p) for name in _OF_GGML]
        self.handle: int = self._native.offramp_products_new(*addresses) or 0
        if not self.handle:
            raise MemoryError
        self.offer: int | None = ctypes.cast(
            self._native.offramp_products_offer, ctypes.c_void_p
        ).value

    @property
    def bytes(self) -> int:
        """Return the bytes of the weights that are packed."""
        return int(self._native.offramp_products_bytes(self.handle)) if self.handle else 0

    def close(self) -> None:
        """Give the memory back; the model must not be run any more."""
        if self.handle:
            self._native.offramp_products_free(self.handle)
        self.handle = 0


def reason_against(library: Any) -> str:
    """Return why the kernels cannot be used here, in words; empty where they can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "they are for Linux on x86-64"
    if library.ggml_backend_dev_count() != 1:
        return "this build of llama.cpp may compute on other devices than the CPU"
    return "" if _native() else "they could not be compiled, or the processor has no AVX2"


def instructions() -> str:
    """Return what the kernels were compiled for; only where there is no reason against them."""
    return str(_native().offramp_products_instructions().decode())


def peak(times: int) -> int:
    """Multiply bytes in registers so many times; return how many were multiplied."""
    return int(_native().offramp_peak(times))


@functools.cache
def _native() -> Any:
    """The compiled kernels; None where there are none that this processor runs."""
    for flags in INSTRUCTIONS:
        native: Any = compiled("products", flags, headers())
        if native is None:
            continue
        native.offramp_products_instructions.restype = ctypes.c_char_p
        if not native.offramp_products_instructions():
            continue
        native.offramp_products_new.restype = ctypes.c_void_p
        native.offramp_products_new.argtypes = [ctypes.c_void_p] * len(_OF_GGML)
        native.offramp_products_bytes.restype = ctypes.c_size_t
        native.offramp_products_bytes.argtypes = [ctypes.c_void_p]
        native.offramp_products_free.argtypes = [ctypes.c_void_p]
        native.offramp_peak.restype = ctypes.c_size_t
        native.offramp_peak.argtypes = [ctypes.c_size_t]
        return native
    return None
