"""Prompts with images as states that enter a decoder, by libmtmd: preprocessing, vision tower and
projector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from offramp.core.errors import InputError
from offramp_llama_cpp.gguf_header import read_header
from offramp_llama_cpp.native.tap import States
from offramp_llama_cpp.projector import MARKER, Projector, check_whole, tokenizer_of, unfit
from offramp_llama_cpp.prompt import Prompt, Span
from offramp_llama_cpp.segment import EngineOptions, Segment
from offramp_llama_cpp.trial import check_projector_survives


class ImageReader(Projector):
    """A projector's file (mmproj) beside a text model."""

    def __init__(
        self, file: str | Path, segment: Segment, words: Path, features: int, options: EngineOptions
    ) -> None:
        """segment: that of the file `words`, which has the tokenizer. features: how many of the
        decoder's layers add visual features to states.

        Raises:
            AdapterError: the file is missing, or no projector for this model.
            UnsupportedBackboneError: it is damaged so that it would end the process.
        """
        check_whole(file)
        check_projector_survives(
            Path(file), options, width=segment.width, features=features, words=words
        )
        model = segment.model
        if features:
            # Of a decoder libmtmd asks that it takes all features, which files share; of a
            # tokenizer alone it asks nothing.
            _check_features(Path(file), segment.width, features)
            model = tokenizer_of(words)
        super().__init__(
            file, model, options, width=segment.width, features=features, owns_model=features > 0
        )

    def prompt(
        self,
        text: str,
        images: Sequence[Image.Image],
        embed: Callable[[list[int]], States],
        axes: int,
    ) -> tuple[Prompt, list[int]]:
        """A prompt with an image at each `MARKER`, and the ids of its text.

        images: in RGB. embed: states [T, D] of tokens. axes: of positions, as a `Segment` has them.

        Raises:
            DataError: llama.cpp does not encode an image.
            InputError: other images than markers.
        """
        if text.count(MARKER) != len(images):
            raise InputError(
                f"The prompt has places for {text.count(MARKER)} images, and {len(images)} came.",
                f"Write {MARKER} where each image stands, or leave it out: they then come first.",
            )
        with self.chunks(text, [np.asarray(image, dtype=np.uint8) for image in images]) as parts:
            return self._read(parts, embed, axes)

    def _read(
        self, parts: list[Any], embed: Callable[[list[int]], States], axes: int
    ) -> tuple[Prompt, list[int]]:
        features = self._features
        states, positions, added = list[States](), list[Any](), list[States]()
        ahead, ids = list[Span](), list[int]()
        at = row = 0
        for part in parts:
            count = self.count(part)
            if self.is_image(part):
                rows = self.rows(part)
                states.append(rows[:, 0])
                added.append(rows[:, 1:])
                positions.append(self.places(part, at))
                if self.looks_ahead(part):
                    ahead.append((row, row + count))
            else:
                text = self.words(part)
                ids += text
                states.append(embed(text))
                added.append(np.zeros((count, features, self._width), dtype=np.float32))
                positions.append(np.tile(np.arange(at, at + count, dtype=np.int32), (4, 1)))
            at += self.length(part)
            row += count
        prompt = Prompt(
            np.concatenate(states),
            np.concatenate(positions, 1) if axes > 1 else None,
            np.concatenate(added) if features else None,
            tuple(ahead),
        )
        return prompt, ids


def _check_features(file: Path, width: int, features: int) -> None:
    """Raise `AdapterError` where a projector makes other rows than [1 + features, D]."""
    try:
        tensors = read_header(file).tensors
        made = sum(name.startswith("v.deepstack.") and "fc2.bias" in name for name in tensors)
        fits = tensors["mm.2.bias"].shape == (width,) and made == features
    except (ValueError, KeyError, OSError) as error:
        raise unfit(file) from error
    if not fits:
        raise unfit(file)
