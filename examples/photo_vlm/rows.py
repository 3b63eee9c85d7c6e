"""What the bridge learns from: photographs with captions and questions, packed into rows.

A row is one photograph and as many texts about it as fit. The photograph and what the texts have in
common at their start come first and once; each text then sees that and itself, by a mask and by
positions that start anew, so that it is computed as if it stood alone.
"""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from offramp.core.errors import DataError
from offramp.data.datasets import read_examples
from offramp.inputs.example import Example

CAPTIONS = "flickr8k_captions.jsonl"
QUESTIONS = "daquar_vqa.jsonl"
HELD_OUT = 5  # one DAQUAR photograph in so many is never trained on
ROUNDS = ("Question: what is in the picture ? Answer:", "Question: what else can be said ? Answer:")

T = TypeVar("T")
Ids = Callable[[str], list[int]]  # a tokenizer, without special tokens


def ids_of(tokenizer: Any) -> Ids:
    """Its ids of a text, without special tokens."""
    return lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])


def held_out(example: Example) -> bool:
    """Whether a DAQUAR photograph is kept for evaluation: by a hash of its name."""
    return int(hashlib.sha256(example.group.encode()).hexdigest(), 16) % HELD_OUT == 0


def read_photographs(data: Path) -> dict[str, list[Example]]:
    """Splits `captions`, `captions_val`, `questions`, `questions_val`.

    Raises:
        DataError: the folder does not hold both files.
    """
    for name in (CAPTIONS, QUESTIONS):
        if not (data / name).is_file():
            raise DataError(
                f"{data} holds no {name}.",
                "Name the folder that has both files and their photographs: --data FOLDER.",
            )
    questions = read_examples(data / QUESTIONS, split="train", require_answers=True)
    return {
        "captions": read_examples(data / CAPTIONS, split="train", require_answers=True),
        "captions_val": read_examples(data / CAPTIONS, split="val", require_answers=True),
        "questions": [example for example in questions if not held_out(example)],
        "questions_val": [example for example in questions if held_out(example)],
    }


def half_of(example: Example) -> int:
    """0 to choose on, 1 to measure on: by a hash of the photograph."""
    return hashlib.sha256(f"half:{example.group}".encode()).digest()[0] % 2


def consensual(examples: Sequence[Example], count: int) -> list[Example]:
    """The examples with only those `count` captions that are likest the others, by CIDEr."""
    from offramp.evaluation.caption_metrics import caption_scores

    most = max(len(example.answers) for example in examples)
    likeness = {example.key: [0.0] * len(example.answers) for example in examples}
    for n in range(most):
        held = [e for e in examples if n < len(e.answers) and len(e.answers) > 1]
        said = {e.key: e.answers[n] for e in held}
        others = {e.key: [a for i, a in enumerate(e.answers) if i != n] for e in held}
        scored = caption_scores(said, others, metrics=("CIDEr",), tokenizer="simple")
        for example, value in zip(held, scored.by_example["CIDEr"], strict=True):
            likeness[example.key][n] = value
    chosen = []
    for example in examples:
        values = likeness[example.key]
        order = sorted(range(len(values)), key=lambda i: -values[i])
        chosen.append(replace(example, answers=tuple(example.answers[i] for i in order[:count])))
    return chosen


@dataclass(frozen=True)
class Text:
    """One text about a photograph: token ids, and which of them are answers to be learnt.

    weight: of those in the loss; below 0 where the text is to be said less often."""

    ids: tuple[int, ...]
    learnt: tuple[bool, ...]
    weight: float = 1.0

    @classmethod
    def of(cls, rounds: Sequence[tuple[str, str]], ids: Ids, end: int) -> Text:
        """Prompts with their answers, each answer behind a space; the last one is ended."""
        tokens: list[int] = []
        learnt: list[bool] = []
        for number, (prompt, answer) in enumerate(rounds):
            lead = ("\n" if number == 0 else " ") + prompt
            for part, is_answer in ((ids(lead), False), (ids(" " + answer.strip()), True)):
                tokens += part
                learnt += [is_answer] * len(part)
        return cls((*tokens, end), (*learnt, True))

    @classmethod
    def chat(cls, rounds: Sequence[tuple[str, str]], ids: Ids, end: int) -> Text:
        """The same in the form of the base's chat template, each answer ended."""
        tokens: list[int] = []
        learnt: list[bool] = []
        for prompt, answer in rounds:
            before = ids(f"\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")
            after = [*ids(answer.strip()), end]
            tokens += before + after
            learnt += [False] * len(before) + [True] * len(after)
        return cls(tuple(tokens), tuple(learnt))


@dataclass(frozen=True)
class Row:
    """image: index of the photograph; pass_: how often the photograph was seen before; sided: a
    text tells left from right."""

    image: int
    texts: tuple[Text, ...]
    pass_: int = 0
    sided: bool = False


@dataclass(frozen=True)
class Batch:
    """Packed rows, B of length T; N answer tokens in all.

    ids, positions: [B, T]; the visual tokens come first, and their ids mean nothing.
    mask: [B, 1, T, T], added to attention scores.
    sources: [N], where in B * T each answer token is predicted; targets, weights: [N].
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    sources: Tensor
    targets: Tensor
    weights: Tensor


def pack(rows: Sequence[Row], visual: int, length: int, dtype: torch.dtype) -> Batch:
    """Lay rows out; texts that no longer fit into `length` are left out, but for the first, which
    is cut."""
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    positions = torch.zeros_like(ids)
    owner = torch.full_like(ids, -1)  # 0: for all texts; 1, 2, ...: of one text; -1: padding
    sources: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    for b, row in enumerate(rows):
        prompts = [text.ids[: text.learnt.index(True)] for text in row.texts]
        shared = _common_start(prompts)
        start = visual + len(shared)
        ids[b, visual:start] = torch.tensor(shared)
        positions[b, :start] = torch.arange(start)
        owner[b, :start] = 0
        place = start
        for number, text in enumerate(row.texts, 1):
            # The last token is predicted and never read.
            body = text.ids[len(shared) : -1][: length - start]
            if place + len(body) > length:
                continue
            here = slice(place, place + len(body))
            ids[b, here] = torch.tensor(body, dtype=torch.long)
            positions[b, here] = torch.arange(start, start + len(body))
            owner[b, here] = number
            for i in range(len(body) + 1):
                if text.learnt[len(shared) + i]:
                    sources.append(b * length + (place + i - 1 if i else start - 1))
                    targets.append(text.ids[len(shared) + i])
                    weights.append(text.weight)
            place += len(body)
    seen = (owner[:, None, :] == 0) | (owner[:, None, :] == owner[:, :, None])
    seen &= torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    learnt = map(torch.tensor, (sources, targets, weights))
    return Batch(ids, positions, mask[:, None], *learnt)


def _common_start(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    shortest = min(prompts, key=len)
    for length, ids in enumerate(zip(*prompts, strict=False)):
        if len(set(ids)) > 1:
            return shortest[:length]
    return shortest


class PackedRows:
    """Batches of packed rows: a pure function of the step, so that a run resumes exactly."""

    def __init__(
        self, splits: Mapping[str, Sequence[Example]], images: Mapping[str, int], ids: Ids, end: int
    ) -> None:
        """images: the index of each photograph, by `Example.group`."""
        self.images = images
        self.captioned = list(splits["captions"])
        asked: dict[str, list[Example]] = defaultdict(list)
        for example in splits["questions"]:
            asked[example.group].append(example)
        self.asked = list(asked.values())
        self.ids, self.end = ids, end

    def captions(self, step: int, seed: int, count: int) -> list[Row]:
        """Photographs with their captions."""
        draw = random.Random(f"{seed}:{step}")
        turn = turn_of(self.captioned, step, count, seed)
        return [self._captions(example, draw, passed) for passed, example in turn]

    def questions(self, step: int, seed: int, count: int) -> list[Row]:
        """Photographs with questions about them."""
        draw = random.Random(f"{seed}:{step}:questions")
        turn = turn_of(self.asked, step, count, seed)
        return [self._questions(examples, draw, passed) for passed, examples in turn]

    def _captions(self, example: Example, draw: random.Random, passed: int) -> Row:
        captions = draw.sample(example.answers, len(example.answers))
        if draw.random() < 0.05:
            rounds = list(zip(ROUNDS, captions, strict=False))
            texts: tuple[Text, ...] = (self._text(rounds),)
        else:
            texts = tuple(self._text([(example.prompt, caption)]) for caption in captions)
        sided = any(word in caption.lower() for caption in captions for word in ("left", "right"))
        return Row(self.images[example.group], texts, pass_=passed, sided=sided)

    def _questions(self, examples: list[Example], draw: random.Random, passed: int) -> Row:
        chosen = draw.sample(examples, min(len(examples), 8))
        rounds = [(example.prompt, draw.choice(example.answers)) for example in chosen]
        if draw.random() < 0.15:
            texts: tuple[Text, ...] = (self._text(rounds[:3]),)
        else:
            texts = tuple(self._text([turn]) for turn in rounds)
        return Row(self.images[examples[0].group], texts, pass_=passed, sided=True)

    def _text(self, rounds: Sequence[tuple[str, str]]) -> Text:
        return Text.of(rounds, self.ids, self.end)


def turn_of(items: Sequence[T], step: int, count: int, seed: int) -> list[tuple[int, T]]:
    """Return the `count` items that are a step's, of an endless sequence that goes through all in
    a new order each time; each with how often that was done before."""
    size = len(items)
    places = (divmod(n, size) for n in range(count * step, count * (step + 1)))
    return [(passed, items[_order(size, passed, seed)[place]]) for passed, place in places]


@lru_cache(maxsize=4)
def _order(size: int, passed: int, seed: int) -> list[int]:
    order = list(range(size))
    random.Random(f"{seed}:{passed}:{size}").shuffle(order)
    return order
