"""The drafts of an exit's own layer, in a loop in C: see drafts.c.

It wants a C compiler and llama.cpp's header files, which llama-cpp-python installs. Elsewhere
Python asks for one draft after the other.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.runtimes.llama_cpp.native.compiling import compiled
from offramp.runtimes.llama_cpp.native.tap import States, Tap
from offramp.runtimes.llama_cpp.packages import headers

Integers = npt.NDArray[np.int32]


class _Drafts(ctypes.Structure):
    _fields_ = (
        ("decode", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
        ("tap", ctypes.c_void_p),
        ("width", ctypes.c_size_t),
        ("words", ctypes.c_size_t),
        ("of_words", ctypes.c_void_p),
        ("of_states", ctypes.c_void_p),
        ("state_scale", ctypes.c_float),
    )


class DraftLoop:
    """Feeds a layer with the words that it says, and its states, until one of them ends it."""

    def __init__(
        self,
        native: Any,
        library: Any,
        context: int,
        tap: Tap,
        of_words: States,
        of_states: States,
        state_scale: float,
    ) -> None:
        """library: with llama.cpp's functions. context: of the layer, `tap` after it. of_words:
        what each word that it can say adds to what enters it [S, D]. of_states: what the numbers of
        a normed state do [D, D], a row for each. state_scale: how many times as large the tap's
        states are as the model's."""
        self._run = native.offramp_drafts
        self._kept = tap, of_words, of_states  # what C has the addresses of
        addresses = [
            ctypes.cast(function, ctypes.c_void_p).value
            for function in (library.llama_decode, library.llama_get_logits)
        ]
        words, width = of_words.shape
        self._drafts = _Drafts(
            *addresses, context, tap.user_data, width, words,
            of_words.ctypes.data, of_states.ctypes.data, state_scale,
        )  # fmt: skip
        self._said = np.empty(0, dtype=np.int32)

    def run(
        self,
        batch: Any,
        positions: Integers,
        word: States,
        state: States,
        ends: npt.NDArray[Any],
        sure: float,
    ) -> list[int] | None:
        """Words, by number, until one is of `ends` [S], the product of their probabilities is below
        `sure`, or there are as many as positions; None where llama.cpp refused one.

        batch: of one row whose logits are asked for. positions: [axes, n]. word, state: what enters
        the layer first [D], and the tap's state before it.
        """
        axes, most = positions.shape
        if len(self._said) < most:
            self._said = np.empty(most, dtype=np.int32)
        count = self._run(
            ctypes.byref(self._drafts), ctypes.byref(batch),
            positions.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(axes),
            word.ctypes.data_as(ctypes.c_void_p), state.ctypes.data_as(ctypes.c_void_p),
            ends.ctypes.data_as(ctypes.c_void_p), ctypes.c_float(sure), ctypes.c_size_t(most),
            self._said.ctypes.data_as(ctypes.c_void_p),
        )  # fmt: skip
        return None if count < 0 else self._said[:count].tolist()


def native_drafts() -> Any:
    """The compiled loop; None where it cannot be compiled."""
    return compiled("drafts", ("-lm",), headers())
