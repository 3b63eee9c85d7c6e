"""Images as states that enter a decoder, by libmtmd: preprocessing, vision tower and projector."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from offramp.errors import AdapterError, DataError, InputError
from offramp.runtimes.llama_cpp.gguf_header import read_header
from offramp.runtimes.llama_cpp.native.tap import States
from offramp.runtimes.llama_cpp.prompt import Prompt, Span
from offramp.runtimes.llama_cpp.segment import Segment

MARKER = "<__media__>"
"""Stands in a prompt where an image does."""
_TEXT, _IMAGE = 0, 1
_MOST_PIXELS = 1 << 26


class ImageReader:
    """A projector's file (mmproj) beside a text model."""

    def __init__(
        self, file: str | Path, segment: Segment, words: Path, features: int, threads: int
    ) -> None:
        """segment: that of the file `words`, which has the tokenizer. features: how many of the
        decoder's layers add visual features to states.

        Raises:
            AdapterError: the file is missing, or no projector for this model.
        """
        if not Path(file).is_file():
            raise AdapterError(f"{file} is no file.", "Name the projector's file: mmproj-...gguf.")
        self._lib, _ = _mtmd()
        self._width, self._features = segment.width, features
        self._words = self._context = None
        model = segment.model
        if features:
            # Of a decoder libmtmd asks that it takes all features, which files share; of a
            # tokenizer alone it asks nothing.
            _check_features(Path(file), segment.width, features)
            model = self._words = _tokenizer_of(self._lib.llama_cpp, words)
        parameters = self._lib.mtmd_context_params_default()
        parameters.use_gpu = False
        parameters.print_timings = False
        parameters.warmup = False
        parameters.n_threads = threads
        self._marker = MARKER.encode()
        parameters.media_marker = self._marker
        self._context = self._lib.mtmd_init_from_file(str(file).encode(), model, parameters)
        if not self._context:
            self.close()
            raise _unfit(file)
        if not self._lib.mtmd_support_vision(self._context):
            self.close()
            raise AdapterError(f"{file} reads no images.", "Name a projector for images.")

    def close(self) -> None:
        """Give the memory back."""
        if self._context:
            self._lib.mtmd_free(self._context)
        if self._words:
            self._lib.llama_cpp.llama_model_free(self._words)
        self._context = self._words = None

    def prompt(
        self,
        text: str,
        images: Sequence[str | Path],
        embed: Callable[[list[int]], States],
        axes: int,
    ) -> tuple[Prompt, list[int]]:
        """A prompt with an image at each `MARKER`, and the ids of its text.

        embed: states [T, D] of tokens. axes: of positions, as a `Segment` has them.

        Raises:
            DataError: an image cannot be read.
            InputError: other images than markers.
        """
        if text.count(MARKER) != len(images):
            raise InputError(
                f"The prompt has places for {text.count(MARKER)} images, and {len(images)} came.",
                f"Write {MARKER} where each image stands, or leave it out: they then come first.",
            )
        bitmaps = [self._bitmap(image) for image in images]
        chunks = self._lib.mtmd_input_chunks_init()
        try:
            data = text.encode()
            asked = self._lib.mtmd_input_text(data, len(data), True, True)
            array = (ctypes.c_void_p * max(1, len(bitmaps)))(*bitmaps)
            code = self._lib.mtmd_tokenize(
                self._context, chunks, ctypes.byref(asked), array, len(bitmaps)
            )
            if code != 0:
                raise InputError(
                    f"llama.cpp does not read this prompt with its images (code {code}).",
                    "Try it without the images, or with smaller ones.",
                )
            return self._read(list(self._chunks(chunks)), embed, axes)
        finally:
            self._lib.mtmd_input_chunks_free(chunks)
            for bitmap in bitmaps:
                self._lib.mtmd_bitmap_free(bitmap)

    def _bitmap(self, image: str | Path) -> Any:
        from PIL import Image, ImageOps, UnidentifiedImageError

        try:
            with Image.open(image) as opened:
                if opened.width * opened.height > _MOST_PIXELS:
                    raise ValueError(f"it has {opened.width} x {opened.height} pixels")
                upright = ImageOps.exif_transpose(opened).convert("RGB")
        except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise DataError(
                f"{image} cannot be read as an image: {error}.", "Give a PNG or JPEG file."
            ) from error
        pixels = np.ascontiguousarray(np.asarray(upright, dtype=np.uint8))
        pointer = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        return self._lib.mtmd_bitmap_init(upright.width, upright.height, pointer)

    def _chunks(self, chunks: Any) -> Iterator[Any]:
        for place in range(self._lib.mtmd_input_chunks_size(chunks)):
            yield self._lib.mtmd_input_chunks_get(chunks, place)

    def _read(
        self, chunks: list[Any], embed: Callable[[list[int]], States], axes: int
    ) -> tuple[Prompt, list[int]]:
        features = self._features
        states, positions, added = list[States](), list[Any](), list[States]()
        ahead, ids = list[Span](), list[int]()
        at = row = 0
        for chunk in chunks:
            count = int(self._lib.mtmd_input_chunk_get_n_tokens(chunk))
            if self._lib.mtmd_input_chunk_get_type(chunk) == _TEXT:
                length = ctypes.c_size_t()
                tokens = self._lib.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(length))
                text = [int(tokens[i]) for i in range(length.value)]
                ids += text
                states.append(embed(text))
                added.append(np.zeros((count, features, self._width), dtype=np.float32))
                positions.append(np.tile(np.arange(at, at + count, dtype=np.int32), (4, 1)))
            else:
                rows = self._encoded(chunk, count)
                states.append(rows[:, 0])
                added.append(rows[:, 1 : 1 + features])
                positions.append(self._places(chunk, count, at))
                if self._lib.mtmd_decode_use_non_causal(self._context, chunk):
                    ahead.append((row, row + count))
            at += int(self._lib.mtmd_input_chunk_get_n_pos(chunk))
            row += count
        prompt = Prompt(
            np.concatenate(states),
            np.concatenate(positions, 1) if axes > 1 else None,
            np.concatenate(added) if features else None,
            tuple(ahead),
        )
        return prompt, ids

    def _encoded(self, chunk: Any, count: int) -> Any:
        """An image's rows [count, 1 + features, D]."""
        if self._lib.mtmd_encode_chunk(self._context, chunk) != 0:
            raise DataError("llama.cpp does not encode the image.", "Try another one.")
        output = self._lib.mtmd_get_output_embd(self._context)
        width = self._width * (1 + self._features)
        rows = np.ctypeslib.as_array(output, shape=(count, width)).copy()
        return rows.reshape(count, 1 + self._features, self._width)

    def _places(self, chunk: Any, count: int, at: int) -> Any:
        """Positions [4, count]: time, height, width, and time once more."""
        image = self._lib.mtmd_input_chunk_get_tokens_image(chunk)
        found = [self._lib.mtmd_image_tokens_get_decoder_pos(image, at, i) for i in range(count)]
        return np.array([[p.t, p.y, p.x, p.t] for p in found], dtype=np.int32).T


def _unfit(file: str | Path) -> AdapterError:
    return AdapterError(
        f"{file} is no projector for this model, or llama.cpp does not know its kind.",
        "Use the mmproj file that was made with the model's.",
    )


def _check_features(file: Path, width: int, features: int) -> None:
    """Raise `AdapterError` where a projector makes other rows than [1 + features, D]."""
    try:
        tensors = read_header(file).tensors
        made = sum(name.startswith("v.deepstack.") and "fc2.bias" in name for name in tensors)
        fits = tensors["mm.2.bias"].shape == (width,) and made == features
    except (ValueError, KeyError, OSError) as error:
        raise _unfit(file) from error
    if not fits:
        raise _unfit(file)


def _tokenizer_of(lib: Any, file: Path) -> Any:
    parameters = lib.llama_model_default_params()
    parameters.vocab_only = True
    return lib.llama_model_load_from_file(str(file).encode(), parameters)


@cache
def _mtmd() -> tuple[Any, Any]:
    """libmtmd, which writes to stderr by itself; and what it calls instead, for as long as it is
    loaded: whichever reader is gone."""
    lib: Any = importlib.import_module("llama_cpp.mtmd_cpp")
    callback = lib.llama_cpp.llama_log_callback(lambda *_: None)
    for name in ("mtmd_log_set", "mtmd_helper_log_set"):
        getattr(lib, name)(callback, None)
    return lib, callback
