"""The models with exits that records are of, those that ship; images that no one trained or chose
thresholds on; and what answers about the tiny models' world are right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from examples.photo_vlm.evaluate import load
from examples.photo_vlm.rows import half_of, read_photographs
from numpy.typing import NDArray

from offramp.adapter.adapter import Adapter
from offramp.adapter.answers import Answer
from offramp.adapter.shipped import load_tiny, shipped_exits, tiny_exits
from offramp.data.scenes import language, world
from offramp.features.input_processor import InputProcessor
from offramp.inputs.example import Example
from offramp.training.config import FREE, TrainConfig
from offramp.training.trainer import train


def photo_exits(adapter: Path | None = None, name: str = "photo") -> Path:
    """The folder of exits that was asked for, or that of those that ship with a photo model."""
    exits = adapter or shipped_exits(name)
    assert exits is not None, "the photo model is there"
    return exits


def load_photo(
    adapter: Path | None = None,
    dtype: str = "float32",
    quantize: str | None = None,
    vision: str = "torch",
    name: str = "photo",
) -> tuple[Adapter, InputProcessor]:
    """A photo model with exits, and its encoder. vision: what runs the tower."""
    backbone, encoder = load(dtype, quantize, vision, name)
    assert backbone.vision_engine == vision
    return Adapter.load(photo_exits(adapter, name), backbone), encoder


def tiny_with(kind: str, exits: Path | None = None) -> tuple[Adapter, InputProcessor]:
    """A tiny model with the exits that ship, or those in a folder, and its encoder."""
    backbone, processor = load_tiny(kind)
    adapter = Adapter.from_pretrained(backbone, exits or tiny_exits(kind))
    return adapter, InputProcessor(backbone, processor)


def trained(
    kind: str, examples: Sequence[Example], **config: Any
) -> tuple[Adapter, InputProcessor]:
    """A tiny model with exits that learn from these examples without labels, and its encoder.
    config: of the training, in batches of 32."""
    backbone, processor = load_tiny(kind)
    options = TrainConfig(**{"exit_kind": "layer", "batch_size": 32, **config, **FREE})
    with TemporaryDirectory() as folder:
        adapter = train(backbone, processor, examples, options, folder)
    return adapter, InputProcessor(backbone, processor)


def halves(data: Path, split: str = "captions_val") -> tuple[list[Example], list[Example]]:
    """Held-out photographs: to choose thresholds on, and to measure on."""
    held = read_photographs(data)[split]
    choosing, measuring = ([e for e in held if half_of(e) == half] for half in (0, 1))
    return choosing, measuring


def text_of(encoder: Any, ids: Sequence[int]) -> str:
    """The text of an answer."""
    return str(encoder.texts(torch.tensor([ids]))[0])


# -- the tiny models' world ------------------------------------------------------------------------


def right(answers: Sequence[Answer], examples: Sequence[Example]) -> NDArray[np.float64]:
    """1 where an answer is right by the world's own judges, else 0."""
    pairs = zip(answers, examples, strict=True)
    return np.array([is_right(answer.text, example) for answer, example in pairs], float)


def is_right(text: str, example: Example) -> bool:
    """A caption, when every attribute of it is; an answer, when it is the reference."""
    if example.prompt != world.CAPTION_PROMPT:
        return language.answer_correct(text, example.answers[0])
    split, index = example.key.split()[0].split("/")  # behind it: how the image was corrupted
    return language.caption_correct(text, world.scene(split, int(index)))
