"""A vision tower with its projector in libmtmd, llama.cpp's library for images: an mmproj file."""

from __future__ import annotations

import ctypes
import importlib
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.core.errors import AdapterError, DataError, InputError
from offramp_llama_cpp.gguf_header import read_header
from offramp_llama_cpp.gguf_writing import new_file
from offramp_llama_cpp.native.products import Products
from offramp_llama_cpp.native.tap import States, Tap
from offramp_llama_cpp.packages import import_gguf
from offramp_llama_cpp.segment import EngineOptions, library, products_of
from offramp_llama_cpp.trial import check_projector_survives

Pixels = npt.NDArray[np.uint8]
MARKER = "<__media__>"
"""Stands in a prompt where an image does."""
_MOST_TOKENS = 1 << 18


class Projector:
    """An mmproj file beside a text model. Not for two threads at once.

    Its graph is llama.cpp's, and its products are ours where these run, as in a `Segment`.
    """

    def __init__(
        self,
        file: str | Path,
        model: Any,
        options: EngineOptions,
        *,
        width: int,
        features: int = 0,
        as_it_is: bool = False,
        owns_model: bool = False,
    ) -> None:
        """model: llama.cpp's pointer to the text model, which has the words around images. width,
        features: D of its states, and how many of its layers add visual features to them. as_it_is:
        whether a picture of any size, where towers take such, stays as large as it is. owns_model:
        whether the text model goes when this does.

        Raises:
            AdapterError: the file is missing, or no projector for this model.
        """
        self._width, self._features = width, features
        self._owned = model if owns_model else None
        self._context: Any = None
        self.products: Products | None = None
        try:
            self._open(Path(file), model, options, as_it_is)
        except BaseException:
            self.close()
            raise

    def _open(self, file: Path, model: Any, options: EngineOptions, as_it_is: bool) -> None:
        self.said = check_whole(file)
        """The file's metadata by key."""
        self._lib = mtmd()
        ggml = library()._lib
        self.products = products_of(ggml, options)
        parameters = self._lib.mtmd_context_params_default()
        parameters.use_gpu = False
        parameters.print_timings = False
        parameters.warmup = False
        parameters.n_threads = options.threads
        self._marker = MARKER.encode()
        parameters.media_marker = self._marker
        if as_it_is and str(self.said.get("clip.projector_type")).startswith("qwen"):
            parameters.image_min_tokens, parameters.image_max_tokens = 1, _MOST_TOKENS
        if self.products is not None:
            self._tap = Tap(ggml, None, self._width, 0, compiled=True, products=self.products)
            parameters.cb_eval = ctypes.cast(self._tap.callback, type(parameters.cb_eval))
            parameters.cb_eval_user_data = self._tap.user_data
        self._context = self._lib.mtmd_init_from_file(str(file).encode(), model, parameters)
        if not self._context:
            raise unfit(file)
        if not self._lib.mtmd_support_vision(self._context):
            raise AdapterError(f"{file} reads no images.", "Name a projector for images.")

    @property
    def packed_bytes(self) -> int:
        """Return the bytes of the weights that our own kernels multiply."""
        return 0 if self.products is None else self.products.bytes

    def close(self) -> None:
        """Give the memory back."""
        if self._context:
            self._lib.mtmd_free(self._context)
        if self.products is not None:
            self.products.close()
        if self._owned:
            library().llama_model_free(self._owned)
        self._context = self._owned = None

    @contextmanager
    def chunks(self, text: str, images: Sequence[Pixels]) -> Iterator[list[Any]]:
        """The parts of a prompt with an image [H, W, 3] at each `MARKER`; theirs is the memory, as
        long as the context is open.

        Raises:
            InputError: libmtmd does not read them.
        """
        bitmaps = [self._bitmap(image) for image in images]
        made = self._lib.mtmd_input_chunks_init()
        try:
            data = text.encode()
            asked = self._lib.mtmd_input_text(data, len(data), True, True)
            array = (ctypes.c_void_p * max(1, len(bitmaps)))(*bitmaps)
            code = self._lib.mtmd_tokenize(
                self._context, made, ctypes.byref(asked), array, len(bitmaps)
            )
            if code != 0:
                raise InputError(
                    f"llama.cpp does not read this prompt with its images (code {code}).",
                    "Try it without the images, or with smaller ones.",
                )
            count = self._lib.mtmd_input_chunks_size(made)
            yield [self._lib.mtmd_input_chunks_get(made, place) for place in range(count)]
        finally:
            self._lib.mtmd_input_chunks_free(made)
            for bitmap in bitmaps:
                self._lib.mtmd_bitmap_free(bitmap)

    def _bitmap(self, pixels: Pixels) -> Any:
        pixels = np.ascontiguousarray(pixels)
        pointer = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        return self._lib.mtmd_bitmap_init(pixels.shape[1], pixels.shape[0], pointer)

    def is_image(self, chunk: Any) -> bool:
        return int(self._lib.mtmd_input_chunk_get_type(chunk)) == 1

    def count(self, chunk: Any) -> int:
        """Return the number of rows of a part."""
        return int(self._lib.mtmd_input_chunk_get_n_tokens(chunk))

    def length(self, chunk: Any) -> int:
        """Return by how much positions after a part are larger than those before it."""
        return int(self._lib.mtmd_input_chunk_get_n_pos(chunk))

    def words(self, chunk: Any) -> list[int]:
        """Return a text's token ids."""
        length = ctypes.c_size_t()
        tokens = self._lib.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(length))
        return [int(tokens[place]) for place in range(length.value)]

    def looks_ahead(self, chunk: Any) -> bool:
        """Return True if an image's rows see each other."""
        return bool(self._lib.mtmd_decode_use_non_causal(self._context, chunk))

    def places(self, chunk: Any, at: int) -> Any:
        """An image's positions [4, T]: time, height, width, and time once more."""
        image = self._lib.mtmd_input_chunk_get_tokens_image(chunk)
        place = self._lib.mtmd_image_tokens_get_decoder_pos
        found = [place(image, at, row) for row in range(self.count(chunk))]
        return np.array([[p.t, p.y, p.x, p.t] for p in found], dtype=np.int32).T

    def rows(self, chunk: Any) -> States:
        """An image's rows [T, 1 + features, D]."""
        if self._lib.mtmd_encode_chunk(self._context, chunk) != 0:
            raise DataError("llama.cpp does not encode the image.", "Try another one.")
        shape = (self.count(chunk), 1 + self._features, self._width)
        output = self._lib.mtmd_get_output_embd(self._context)
        return np.ctypeslib.as_array(output, shape=shape).copy()


class Tower:
    """The tokens that a projector makes of pictures in the size in which its tower sees them,
    beside no text model. Any thread may ask."""

    def __init__(
        self, file: str | Path, options: EngineOptions, *, width: int, features: int = 0
    ) -> None:
        """Load a projector. Raises what `Projector` and `check_projector_survives` raise."""
        self._lock = threading.Lock()
        check_whole(file)
        check_projector_survives(Path(file), options, width=width, features=features)
        self._projector = Projector(
            file,
            no_words(),
            options,
            width=width,
            features=features,
            as_it_is=True,
            owns_model=True,
        )
        self.said: dict[str, Any] = self._projector.said
        # libmtmd resizes what it cuts into tiles, but a row of tiles as long as it wants it. What
        # comes first is the row in small.
        self._tiled = self.said.get("clip.projector_type") == "idefics3"
        longest = self.said.get("clip.vision.preproc_image_size", 0)
        self._longest = int(longest) if self._tiled else 0

    def rows(self, picture: Pixels) -> States:
        """The rows [T, 1 + features, D] of a picture [H, W, 3].

        Raises:
            InputError: libmtmd does not read it.
        """
        high, wide, _ = picture.shape
        if wide < self._longest:
            row = np.zeros((high, self._longest, 3), dtype=np.uint8)
            row[:, :wide] = picture
            picture = row
        with self._lock, self._projector.chunks(MARKER, [picture]) as parts:
            images = [part for part in parts if self._projector.is_image(part)]
            return self._projector.rows(images[self._tiled])

    @property
    def packed_bytes(self) -> int:
        """Return the bytes of the weights that our own kernels multiply."""
        return self._projector.packed_bytes

    def close(self) -> None:
        """Give the memory back, once no picture is being looked at."""
        with self._lock:
            self._projector.close()


def unfit(file: str | Path) -> AdapterError:
    return AdapterError(
        f"{file} is no projector for this model, or llama.cpp does not know its kind.",
        "Use the mmproj file that was made with the model's.",
    )


def check_whole(file: str | Path) -> dict[str, Any]:
    """Return what a projector's file says by key. Raise `AdapterError` where it is missing or
    damaged."""
    file = Path(file)
    if not file.is_file():
        raise AdapterError(f"{file} is no file.", "Name the projector's file: mmproj-...gguf.")
    try:
        return read_header(file).said
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise unfit(file) from error


def tokenizer_of(file: str | Path) -> Any:
    """llama.cpp's pointer to a model of which nothing but the tokenizer was loaded."""
    lib = library()
    parameters = lib.llama_model_default_params()
    parameters.vocab_only = True
    return lib.llama_model_load_from_file(str(file).encode(), parameters)


def no_words() -> Any:
    """llama.cpp's pointer to a tokenizer of bytes: libmtmd wants one for the words that it puts
    around images."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = import_gguf().TokenType
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file = Path(folder) / "words.gguf"
        with new_file(file, "llama") as out:
            out.add_tokenizer_model("llama")
            out.add_token_list(words)
            out.add_token_scores([0.0] * len(words))
            out.add_token_types([kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256])
            out.add_add_bos_token(False)
        return tokenizer_of(file)


@cache
def mtmd() -> Any:
    """libmtmd, which writes to stderr by itself, made to be silent, for as long as it is loaded:
    whichever projector is gone."""
    lib: Any = importlib.import_module("llama_cpp.mtmd_cpp")
    _KEPT.append(lib.llama_cpp.llama_log_callback(lambda *_: None))
    for name in ("mtmd_log_set", "mtmd_helper_log_set"):
        getattr(lib, name)(_KEPT[-1], None)
    return lib


_KEPT: list[Any] = []
