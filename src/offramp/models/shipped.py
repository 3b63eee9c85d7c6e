"""The two VLMs that ship with the package, and their world's examples with exact ground truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offramp import world
from offramp.backbone import Backbone
from offramp.errors import InputError, did_you_mean
from offramp.examples import Example

TINY = ("opt", "t5")


def tiny_folder(kind: str) -> Path:
    """Folder of a shipped model, for plain `from_pretrained`. Raise `InputError` if unknown."""
    if kind not in TINY:
        raise InputError(f"No tiny model {kind!r} ships with offramp.", did_you_mean(kind, TINY))
    return Path(__file__).parent / "tiny" / kind


def load_tiny(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Backbone, Any]:
    """A shipped model, "opt" or "t5", and its processor."""
    from transformers import AutoProcessor

    folder = tiny_folder(kind)
    backbone = Backbone.from_pretrained(folder, dtype=dtype)
    backbone.name = f"offramp/tiny-{kind}"
    return backbone, AutoProcessor.from_pretrained(folder)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Task:
    """Examples of one task, and how one answer is judged right."""

    name: str
    examples: list[Example]
    correct: Callable[[str, Example], bool]


def captions(split: str, n: int, start: int = 0) -> Task:
    """Pictures to describe; a caption is right when every attribute of it is."""
    scenes = {f"{split}/{i}": world.scene(split, i) for i in range(start, start + n)}
    examples = [
        Example(world.render(s), world.CAPTION_PROMPT, (world.caption(s),), key, group=key)
        for key, s in scenes.items()
    ]
    return Task(
        "captions", examples, lambda text, example: world.caption_correct(text, scenes[example.key])
    )


def questions(split: str, n: int, start: int = 0, each: int = 2) -> Task:
    """`n` pictures, `each` questions on each; an answer is right when it is the reference."""
    examples = []
    for index in range(start, start + n):
        scene = world.scene(split, index)
        picture = world.render(scene)
        for turn, (question, answer) in enumerate(world.questions(scene, each)):
            prompt = world.question_prompt(question)
            key = f"{split}/{index}/{turn}"
            examples.append(Example(picture, prompt, (answer,), key, group=f"{split}/{index}"))
    return Task(
        "questions",
        examples,
        lambda text, example: world.answer_correct(text, example.answers[0]),
    )
