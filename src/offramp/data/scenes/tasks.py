"""Examples of the procedural world with exact ground truth, by task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from offramp.data.scenes import language, world
from offramp.inputs.example import Example


@dataclass(frozen=True)
class Task:
    """The examples of one task, and the function that judges one answer."""

    name: str
    examples: list[Example]
    correct: Callable[[str, Example], bool]


def captions(split: str, n: int, start: int = 0) -> Task:
    """Return pictures to describe; a caption is right if all its attributes are."""
    scenes = {f"{split}/{i}": world.scene(split, i) for i in range(start, start + n)}
    examples = [
        Example(world.render(s), world.CAPTION_PROMPT, (language.caption(s),), key, group=key)
        for key, s in scenes.items()
    ]
    return Task(
        "captions",
        examples,
        lambda text, example: language.caption_correct(text, scenes[example.key]),
    )


def questions(split: str, n: int, start: int = 0, per_picture: int = 2) -> Task:
    """Return `n` images with `per_picture` questions each; an answer is right if it equals the
    reference."""
    examples = []
    for index in range(start, start + n):
        scene = world.scene(split, index)
        picture = world.render(scene)
        for turn, (question, answer) in enumerate(language.questions(scene, per_picture)):
            prompt = language.question_prompt(question)
            key = f"{split}/{index}/{turn}"
            examples.append(Example(picture, prompt, (answer,), key, group=f"{split}/{index}"))
    return Task(
        "questions",
        examples,
        lambda text, example: language.answer_correct(text, example.answers[0]),
    )


def captions_and_questions(
    split: str, n: int, start: int = 0, per_picture: int = 2
) -> list[Example]:
    """Return the examples of both tasks about the same `n` images."""
    asked = questions(split, n, start, per_picture)
    return captions(split, n, start).examples + asked.examples
