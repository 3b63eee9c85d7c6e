"""One GGUF file in llama.cpp: states in, states of its tap and logits out."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from offramp.core.errors import AdapterError, InputError, check_known
from offramp_llama_cpp.native.drafts import DraftLoop, FeedLoop, native_drafts
from offramp_llama_cpp.native.products import Products, instructions, reason_against
from offramp_llama_cpp.native.tap import States, Tap
from offramp_llama_cpp.packages import import_llama_cpp
from offramp_llama_cpp.prompt import Positions, Prompt

log = logging.getLogger(__name__)

READ_AT_ONCE = 512
"""Rows of a prompt in one call, where no image or prompt must fit into one."""


_LONGEST, _MOST_THREADS, _MOST_SEQUENCES = 1 << 20, 512, 64
_SPARE = 64
"""Rows beyond the context: of the checks when a segment loads, and of a token that is fed twice."""
_PADDING = 256
"""Cells of a sequence's cache are a multiple of these."""
_CACHES = {"f32": 0, "f16": 1}
"""Number formats of keys and values, by their numbers in ggml."""


@dataclass(frozen=True)
class EngineOptions:
    """Settings by which llama.cpp runs.

    context: longest prompt with its answer, in tokens. threads: for a token and for a prompt.
    flash_attention: its fused attention; without it several rows in a call may round otherwise than
    one. cache: number format of keys and values, f16 or f32.
    compiled_tap: read states by a callback in C where it can be compiled, else in Python.
    kernels: multiply by our own kernels, made for few tokens, where they run; see
    `native.products`. They hold the weights a second time, and the first need not stay in memory.
    sequences: answers written at a time, each with a context of its own.

    Raises:
        InputError: a number that llama.cpp does not run with.
    """

    context: int = 2048
    threads: int = 1
    flash_attention: bool = True
    cache: str = "f16"
    compiled_tap: bool = True
    kernels: bool = True
    sequences: int = 1

    def __post_init__(self) -> None:
        # llama.cpp ends the process where a number is out of range.
        for name, most in (
            ("context", _LONGEST),
            ("threads", _MOST_THREADS),
            ("sequences", _MOST_SEQUENCES),
        ):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise InputError(
                    f"llama.cpp does not run with {name}={value!r}.",
                    f"Give a whole number from 1 to {most}.",
                )
        check_known("Number format of keys and values", [self.cache], tuple(_CACHES))


INPUT_SCALE, STATE_SCALE = "offramp.input_scale", "offramp.state_scale"
"""Metadata: what states are multiplied by before they go into the graph, and how many times as
large its own states are as the model's."""
EMBEDDING_SCALE = "offramp.embedding_scale"
"""Metadata, of the last file: what a token's embedding is multiplied by to enter the decoder."""
AHEAD, FIRST_LAYER = "offramp.ahead", "offramp.first_layer"
"""Metadata: whether prompts hold parts whose tokens see each other, and which of the decoder's
layers is the file's first."""


class Part(NamedTuple):
    """Rows of one of the sequences that share a call. states: [n, D], the last `idle` of which only
    fill the call. outputs: how many rows before the idle ones get logits."""

    slot: int
    states: States
    outputs: int
    idle: int


class _Row:
    """A sequence. length: rows that were fed."""

    def __init__(self, positions: Positions) -> None:
        self.length = 0
        self.positions = positions
        self.features: States | None = None


class Segment:
    """A model and a context of llama.cpp, fed with states.

    width: of states. axes: of positions, 1 or 4. features: how many layers add visual features to
    their states. at_once: most rows in a call. sequences: how many there are, each in a slot.
    model: llama.cpp's pointer, for what reads the file's vocabulary.
    """

    def __init__(self, file: Path, options: EngineOptions, *, tap_layer: int | None) -> None:
        """tap_layer: the layer of the file whose output is read; None: no one's.

        Raises:
            AdapterError: llama.cpp does not load the file.
            InputError: the context does not fit into memory, or the package is missing.
        """
        self._lib = lib = library()
        self.model: Any = None
        self._context: Any = None
        self.products: Products | None = products_of(lib._lib, options)
        parameters = lib.llama_model_default_params()
        parameters.n_gpu_layers = 0
        parameters.use_extra_bufts = self.products is None  # rearranged for llama.cpp's own
        self.model = lib.llama_model_load_from_file(str(file).encode(), parameters)
        if not self.model:
            self.close()
            raise AdapterError(
                f"llama.cpp does not load {file}.",
                "Export it again, with the version of llama-cpp-python that is installed now.",
            )
        self.width: int = int(lib.llama_model_n_embd(self.model))
        self.layers: int = int(lib.llama_model_n_layer(self.model))
        self.vocabulary: int = int(lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model)))
        self.axes = 4 if lib.llama_model_rope_type(self.model) in _SEVERAL_AXES else 1
        self.features: int = int(lib.llama_model_n_embd_inp(self.model)) // self.width - 1
        self._input_scale = np.float32(self.said(INPUT_SCALE) or 1.0)
        self._state_scale = np.float32(self.said(STATE_SCALE) or 1.0)
        self._first_layer = int(self.said(FIRST_LAYER) or 0)
        # What looks ahead must fit into a call, or llama.cpp ends the process.
        self.looks_ahead: bool = self.said(AHEAD) == "true"
        self.at_once: int = max(READ_AT_ONCE, options.context) if self.looks_ahead else READ_AT_ONCE
        self._callback: Tap | None = None
        if tap_layer is not None or self.products is not None:
            self._callback = Tap(
                lib._lib,
                self._tapped_tensor(tap_layer),
                self.width,
                self.at_once,
                compiled=options.compiled_tap,
                products=self.products,
            )
        self.tap: Tap | None = None if tap_layer is None else self._callback
        self._context = lib.llama_init_from_model(self.model, self._parameters(options))
        if not self._context:
            self.close()
            raise InputError(
                f"llama.cpp makes no context of {options.context} tokens for {file}.",
                "Ask for a shorter one: context=1024.",
            )
        self._memory = lib.llama_get_memory(self._context)
        self.sequences: int = options.sequences
        self._most = options.context + _SPARE + self.at_once
        table = _PLAIN.table(self.axes, self._most)
        self._rows = [_Row(table) for _ in range(self.sequences)]
        self._ahead = False
        self._batch = _Batch(lib, self.at_once, self.width, self.features, self.axes)
        address_function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
        self._logits_address = address_function(("llama_get_logits", lib._lib))
        self._address = 0
        self._blank = np.zeros((1, self.width), dtype=np.float32)
        self._logits = np.empty((0, self.vocabulary), dtype=np.float32)

    def length_of(self, slot: int = 0) -> int:
        """Return the number of rows that were fed to a sequence."""
        return self._rows[slot].length

    def begin(self, prompt: Prompt | None = None, slot: int = 0, kept: int = 0) -> None:
        """Forget a sequence but for its first `kept` rows, which `prompt` begins with too. The next
        rows are those of the prompt, whose positions and features they have; None: text, from
        position 0 on."""
        row = self._rows[slot]
        row.length = min(row.length, kept)
        self._forget(slot)
        prompt = prompt or _PLAIN
        row.positions = prompt.table(self.axes, self._most)
        features = prompt.features if self.features else None
        if features is not None:
            own = features[:, self._first_layer :][:, : self.features]
            features = own.reshape(len(own), -1)
        row.features = features

    def feed(
        self, states: States, outputs: int, idle: int = 0, *, ahead: bool = False, slot: int = 0
    ) -> None:
        """Run the layers over `states` [n, D], which stand after what was fed before.

        n: at most `at_once`. idle: how many of the last rows only fill the call and are
        forgotten again. outputs: of how many of those before them there will be logits. ahead: the
        rows see each other, and not only what stands before them. slot: the sequence's.
        """
        self._run((Part(slot, states, outputs, idle),), ahead)

    def feed_together(self, parts: Sequence[Part]) -> None:
        """Run the layers over rows of several sequences in one call, as many of each.

        parts: of slots one after the other, ascending: llama.cpp takes no others at once. Taps and
        logits come in that order, taps of idle rows too.
        """
        self._run(parts, False)

    def _run(self, parts: Sequence[Part], ahead: bool) -> None:
        if self.tap is not None:
            self.tap.clear()
        self._look_ahead(ahead)
        count, rows = len(parts[0].states), [self._rows[part.slot] for part in parts]
        places = [row.positions[:, row.length : row.length + count] for row in rows]
        states, positions, features = parts[0].states, places[0], rows[0].features
        if len(parts) > 1:
            states, features = np.concatenate([part.states for part in parts]), None
            positions = np.concatenate(places, 1)
        elif features is not None:
            features = features[rows[0].length : rows[0].length + count]
        if self._input_scale != 1.0:
            states = states * self._input_scale
        self._decode(self._batch.fill(states, features, positions, parts), rows[0])
        for part, row in zip(parts, rows, strict=True):
            row.length += count
            self.crop(part.idle, part.slot)

    def _look_ahead(self, ahead: bool) -> None:
        if ahead != self._ahead:
            self._lib.llama_set_causal_attn(self._context, not ahead)
            self._ahead = ahead

    def _decode(self, batch: Any, row: _Row) -> None:
        if (code := self._lib.llama_decode(self._context, batch)) != 0:
            raise _refused(batch.n_tokens, row, code)

    def draft_loop(self, of_words: States, of_states: States) -> DraftLoop | None:
        """A loop that feeds the tapped layer with its own words and states; None where none can be
        compiled. of_words, of_states: as of `DraftLoop`."""
        native = native_drafts() if self.tap is not None and self.tap.compiled else None
        if native is None or self.tap is None:
            return None
        return DraftLoop(
            native,
            self._lib._lib,
            self._context,
            self.tap,
            np.ascontiguousarray(self._input_scale * of_words),
            np.ascontiguousarray(self._input_scale * of_states),
            float(self._state_scale),
        )

    def draft(
        self,
        loop: DraftLoop,
        word: States,
        state: States,
        ends: npt.NDArray[np.bool_],
        most: int,
        sure: float,
        slot: int = 0,
    ) -> tuple[list[int], float]:
        """Let the loop draft after a sequence. Return the numbers of the drafted words, and the
        product of their probabilities. The sequence stays as it was.

        word, state: what enters the layer first [D], and the tapped state before it. ends: whether
        a word ends an answer [S]. most, sure: as of `DraftRoom`.
        """
        row = self._rows[slot]
        self._look_ahead(False)
        positions = row.positions[:, row.length : row.length + most]
        positions = np.ascontiguousarray(positions, dtype=np.int32)
        word, state = self._input_scale * word, self._state_scale * state
        batch = self._batch.fill(word[None], None, positions[:, :1], [Part(slot, word[None], 1, 0)])
        said = loop.run(batch, positions, word, state, ends, sure)
        self._lib.llama_memory_seq_rm(self._memory, slot, int(positions[0, 0]), -1)
        if said is None:
            raise _refused(1, row, -1)
        return said

    def feed_loop(self, table: States, ids: Sequence[int] | None) -> FeedLoop | None:
        """A loop that feeds the layers with what the exit after them says; None where none can be
        compiled, or states are scaled on their way in. table, ids: as of `FeedLoop`."""
        native = native_drafts() if self.tap is not None and self.tap.compiled else None
        if native is None or self.tap is None or self._input_scale != 1.0:
            return None
        return FeedLoop(
            native, self._lib._lib, self._context, self.tap, self.vocabulary, table, ids
        )

    def feed_on(
        self,
        loop: FeedLoop,
        token: int,
        most: int,
        sure: float,
        ends: Callable[[int], bool],
        slot: int = 0,
    ) -> tuple[list[int], States]:
        """Feed a token, and then what the exit says, `most` at most; what it says after each, and
        its logits. Their states are at the tap. sure, ends: as of `FeedLoop.run`."""
        row = self._rows[slot]
        self._look_ahead(False)
        positions = row.positions[:, row.length : row.length + most]
        positions = np.ascontiguousarray(positions, dtype=np.int32)
        blank = self._blank
        batch = self._batch.fill(blank, None, positions[:, :1], [Part(slot, blank, 1, 0)])
        made = loop.run(batch, positions, token, ends, sure)
        if made is None:
            raise _refused(1, row, -1)
        row.length += len(made[0])
        return made

    def tapped(self) -> States:
        """The states [n, D] that the last call took at the tap; a copy."""
        assert self.tap is not None
        rows = self.tap.rows()
        return rows.copy() if self._state_scale == 1.0 else rows / self._state_scale

    def logits(self, rows: int) -> States:
        """Logits [rows, V] of the last call's outputs, a view that the next call overwrites."""
        if not rows:
            return self._logits[:0]
        address = self._logits_address(self._context)
        if address != self._address or rows > len(self._logits):  # it moves when it grows
            pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_float))
            self._logits = np.ctypeslib.as_array(pointer, shape=(rows, self.vocabulary))
            self._address = address
        return self._logits[:rows]

    def crop(self, rows: int, slot: int = 0) -> None:
        """Forget the last `rows` rows of a sequence."""
        if rows:
            self._rows[slot].length -= rows
            self._forget(slot)

    def _forget(self, slot: int) -> None:
        """Forget what stands after a sequence's length."""
        row = self._rows[slot]
        first = int(row.positions[0, row.length])
        self._lib.llama_memory_seq_rm(self._memory, slot, first, -1)

    def close(self) -> None:
        """Give the memory back; the segment is of no use afterwards."""
        if self._context:
            self._lib.llama_free(self._context)
        if self.model:
            self._lib.llama_model_free(self.model)
        if self.products is not None:
            self.products.close()
        self._context = self.model = None

    def _tapped_tensor(self, layer: int | None) -> str | None:
        """The name of the tensor that the layer hands on, with the features added after it."""
        if layer is None:
            return None
        return f"deepstack_out-{layer}" if layer < self.features else f"l_out-{layer}"

    def said(self, key: str) -> str:
        """Return what the file's metadata holds under `key`, as text; empty where it has none."""
        text = ctypes.create_string_buffer(64)
        found = self._lib.llama_model_meta_val_str(self.model, key.encode(), text, len(text))
        return text.value.decode() if found >= 0 else ""

    def _parameters(self, options: EngineOptions) -> Any:
        lib = self._lib
        parameters = lib.llama_context_default_params()
        cells = options.context + _SPARE
        if options.sequences > 1:
            cells = -(-cells // _PADDING) * _PADDING * options.sequences
        parameters.n_ctx = cells
        parameters.n_batch = parameters.n_ubatch = self.at_once
        parameters.swa_full = True  # windows are masks alone: rows can be taken back
        # Cells of its own for each: in shared ones a sequence's rows would change their order.
        parameters.n_seq_max = options.sequences
        parameters.kv_unified = False
        parameters.n_threads = parameters.n_threads_batch = options.threads
        parameters.flash_attn_type = (
            lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if options.flash_attention
            else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        parameters.type_k = parameters.type_v = _CACHES[options.cache]
        parameters.no_perf = True
        if self._callback is not None:
            parameters.cb_eval = ctypes.cast(self._callback.callback, type(parameters.cb_eval))
            parameters.cb_eval_user_data = self._callback.user_data
        return parameters


def _refused(rows: int, row: _Row, code: int) -> InputError:
    return InputError(
        f"llama.cpp refused {rows} rows at position {row.length} (code {code}).",
        "Give a longer context, e.g. context=4096.",
    )


_SEVERAL_AXES = (8, 40)
"""Kinds of rotary positions whose rows have four numbers each: plain and interleaved M-RoPE."""
_PLAIN = Prompt(np.empty((0, 0), dtype=np.float32))


class _Batch:
    """The arrays of a llama.cpp batch, allocated once."""

    def __init__(self, lib: Any, rows: int, width: int, features: int, axes: int) -> None:
        self._width = width
        self._states = np.zeros((rows, width * (1 + features)), dtype=np.float32)
        self._featured = 0  # rows that hold features
        self._positions = np.zeros(axes * rows, dtype=np.int32)
        self._ones = np.ones(rows, dtype=np.int32)
        self._outputs = np.zeros(rows, dtype=np.int8)
        self._slots = np.zeros(rows, dtype=np.int32)
        int_pointer = ctypes.POINTER(ctypes.c_int32)
        places = range(self._slots.ctypes.data, self._slots.ctypes.data + 4 * rows, 4)
        self._sequences = (int_pointer * rows)(
            *[ctypes.cast(place, int_pointer) for place in places]
        )
        self._kind: tuple[Any, ...] = ()
        self._batch = lib.llama_batch()
        self._batch.pos = self._positions.ctypes.data_as(int_pointer)
        self._batch.n_seq_id = self._ones.ctypes.data_as(int_pointer)
        self._batch.seq_id = ctypes.cast(self._sequences, ctypes.POINTER(int_pointer))
        self._batch.logits = self._outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        self._batch.embd = self._states.ctypes.data_as(ctypes.POINTER(ctypes.c_float))

    def fill(
        self, states: States, features: States | None, positions: Positions, parts: Sequence[Part]
    ) -> Any:
        """states, positions: [n, D] and [axes, n], of the parts' rows, of each as many. features:
        of the first rows [m, ...], m <= n; None: of none."""
        rows, each = len(states), len(parts[0].states)
        self._states[:rows, : self._width] = states
        self._positions[: positions.size] = positions.ravel()  # axis after axis
        if self._featured or features is not None:
            self._fill_features(features)
        kind = (each, *[(part.slot, part.outputs, part.idle) for part in parts])
        if self._kind != kind:
            self._kind = kind
            self._batch.n_tokens = rows
            self._outputs[:rows] = 0
            for place, part in enumerate(parts):
                end = (place + 1) * each - part.idle
                self._slots[place * each : (place + 1) * each] = part.slot
                self._outputs[end - part.outputs : end] = 1
        return self._batch

    def _fill_features(self, features: States | None) -> None:
        self._states[: self._featured, self._width :] = 0.0
        self._featured = 0 if features is None else len(features)
        if features is not None:
            self._states[: self._featured, self._width :] = features


def kernels() -> str:
    """Return whose kernels multiply on this machine, in words.

    Raises:
        InputError: the extra `llama-cpp` is not installed.
    """
    reason = reason_against(library()._lib)
    return f"its own kernels: {reason}" if reason else f"kernels of offramp for {instructions()}"


def products_of(library: Any, options: EngineOptions) -> Products | None:
    """Our own kernels, where they run here and are asked for. library: with ggml's functions."""
    if not (options.kernels and options.compiled_tap):
        return None
    reason = reason_against(library)
    if reason:
        _warn_of_slower_kernels(reason)
        return None
    return Products(library)


@functools.cache
def _warn_of_slower_kernels(reason: str) -> None:
    """Warn, once a process, that llama.cpp runs its own kernels here."""
    log.warning(
        "llama.cpp multiplies by its own kernels, which take several times as long for a few "
        "tokens: %s. EngineOptions(kernels=False) asks for that.",
        reason,
    )


@functools.cache
def library() -> Any:
    """llama.cpp's functions; what it has to say goes to the logger of its bindings."""
    lib: Any = import_llama_cpp().llama_cpp
    log = logging.getLogger("llama-cpp-python")
    if log.level == logging.NOTSET:  # it would write every tensor of a file to stderr
        log.setLevel(logging.CRITICAL)
    lib.llama_backend_init()
    return lib
