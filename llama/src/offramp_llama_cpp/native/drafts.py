"""What an exit says by itself, in a loop in C: see drafts.c.

It wants a C compiler and llama.cpp's header files, which llama-cpp-python installs. Elsewhere
Python asks for one token after the other.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp_llama_cpp.native.compiling import compiled
from offramp_llama_cpp.native.recipe import LIBM
from offramp_llama_cpp.native.tap import States, Tap
from offramp_llama_cpp.packages import headers

Integers = npt.NDArray[np.int32]
Ends = npt.NDArray[np.bool_]
"""Whether each word ends an answer [S]."""


class _Loop(ctypes.Structure):
    _fields_ = (
        ("decode", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
        ("tap", ctypes.c_void_p),
        ("width", ctypes.c_size_t),
        ("words", ctypes.c_size_t),
        ("of_words", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("of_states", ctypes.c_void_p),
        ("state_scale", ctypes.c_float),
    )


def _loop(
    library: Any,
    context: int,
    tap: Tap,
    words: int,
    of_words: States,
    rows: Integers | None = None,
    of_states: States | None = None,
    state_scale: float = 1.0,
) -> _Loop:
    """The structure; what it has the addresses of must outlive it."""
    functions = library.llama_decode, library.llama_get_logits
    return _Loop(
        *[ctypes.cast(function, ctypes.c_void_p).value for function in functions],
        context,
        tap.user_data,
        of_words.shape[1],
        words,
        of_words.ctypes.data,
        None if rows is None else rows.ctypes.data,
        None if of_states is None else of_states.ctypes.data,
        state_scale,
    )


def _with_room(held: Any, rows: int) -> Any:
    """Return an array, or an empty one like it that has so many rows."""
    return held if len(held) >= rows else np.empty((rows, *held.shape[1:]), dtype=held.dtype)


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
        self._loop = _loop(
            library, context, tap, len(of_words), of_words, None, of_states, state_scale
        )
        self._said = np.empty(0, dtype=np.int32)

    def run(
        self, batch: Any, positions: Integers, word: States, state: States, ends: Ends, sure: float
    ) -> tuple[list[int], float] | None:
        """Words, by number, until one is of `ends` [S], the product of their probabilities is below
        `sure`, or there are as many as positions; and that product. None where llama.cpp refused
        one.

        batch: of one row whose logits are asked for. positions: [axes, n]. word, state: what enters
        the layer first [D], and the tap's state before it.
        """
        axes, most = positions.shape
        self._said, product = _with_room(self._said, most), ctypes.c_float()
        count = self._run(
            ctypes.byref(self._loop),
            ctypes.byref(batch),
            positions.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_size_t(axes),
            word.ctypes.data_as(ctypes.c_void_p),
            state.ctypes.data_as(ctypes.c_void_p),
            ends.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_float(sure),
            ctypes.c_size_t(most),
            self._said.ctypes.data_as(ctypes.c_void_p),
            ctypes.byref(product),
        )
        return None if count < 0 else (self._said[:count].tolist(), product.value)


class FeedLoop:
    """Feeds layers with the tokens that the exit after them says, until it is not confident."""

    def __init__(
        self,
        native: Any,
        library: Any,
        context: int,
        tap: Tap,
        words: int,
        table: States,
        ids: Sequence[int] | None,
    ) -> None:
        """context: of the layers and their exit, `tap` before it. words: S of what it can say, by
        their ids; None: the vocabulary. table: [V, D], what the tokens enter the layers as."""
        self._run = native.offramp_feeds
        self.ids: Integers = np.arange(words, dtype=np.int32)
        if ids is not None:
            self.ids = np.array(ids, dtype=np.int32)
        self._kept = tap, table  # what C has the addresses of, as the ids
        self._loop = _loop(library, context, tap, words, table, self.ids)
        self._said = np.empty(0, dtype=np.int32)
        self._logits = np.empty((0, words), dtype=np.float32)
        self._ending = lru_cache(maxsize=16)(self._asked_of_all)

    def run(
        self, batch: Any, positions: Integers, token: int, ends: Callable[[int], bool], sure: float
    ) -> tuple[list[int], States] | None:
        """Tokens that the exit says after `token` and then after each of its own, until one `ends`
        the answer, is less likely than `sure`, or there are as many as positions; and its logits
        [n, S] of each, a view that the next run overwrites. None where llama.cpp refused a row.

        batch: of one row whose logits are asked for. positions: [axes, n].
        """
        axes, most = positions.shape
        self._said = _with_room(self._said, most)
        self._logits = _with_room(self._logits, most)
        count = self._run(
            ctypes.byref(self._loop),
            ctypes.byref(batch),
            positions.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_size_t(axes),
            ctypes.c_int32(token),
            self._ending(ends).ctypes.data_as(ctypes.c_void_p),
            ctypes.c_float(sure),
            ctypes.c_size_t(most),
            self._said.ctypes.data_as(ctypes.c_void_p),
            self._logits.ctypes.data_as(ctypes.c_void_p),
        )
        return None if count < 0 else (self.ids[self._said[:count]].tolist(), self._logits[:count])

    def _asked_of_all(self, ends: Callable[[int], bool]) -> Ends:
        return np.array([ends(token) for token in self.ids.tolist()])


def native_drafts() -> Any:
    """The compiled loop; None where it cannot be compiled."""
    return compiled("drafts", LIBM, headers())
