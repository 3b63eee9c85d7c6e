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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.data.datasets import read_examples
from offramp.data.example import Example
from offramp.errors import DataError

CAPTIONS = "flickr8k_captions.jsonl"
QUESTIONS = "daquar_vqa.jsonl"
HELD_OUT = 5  # one DAQUAR photograph in so many is never trained on
ROUNDS = ("Question: what is in the picture ? Answer:", "Question: what else can be said ? Answer:")

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


@dataclass(frozen=True)
class Text:
    """One text about a photograph: token ids, and which of them are answers to be learnt."""

    ids: tuple[int, ...]
    learnt: tuple[bool, ...]

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


@dataclass(frozen=True)
class Row:
    """image: index of the photograph; weight: of its answers' tokens in the loss."""

    image: int
    texts: tuple[Text, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Batch:
    """Packed rows, B of length T; N answer tokens in all.

    ids, positions: [B, T]; the visual tokens come first, and their ids mean nothing.
    mask: [B, 1, T, T], added to attention scores.
    sources: [N], where in B * T each answer token is predicted; targets, weights: [N].
    """

    images: list[int]
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
                    weights.append(row.weight)
            place += len(body)
    seen = (owner[:, None, :] == 0) | (owner[:, None, :] == owner[:, :, None])
    seen &= torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return Batch(
        [row.image for row in rows],
        ids,
        positions,
        mask[:, None],
        torch.tensor(sources),
        torch.tensor(targets),
        torch.tensor(weights),
    )


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
        self._ids, self.end = ids, end

    def step(self, step: int, seed: int, captioned: int, asked: int) -> list[Row]:
        """The rows of one step: so many photographs with captions, so many with questions."""
        draw = random.Random(f"{seed}:{step}")
        first = _turn(captioned * step, captioned, len(self.captioned), seed)
        second = _turn(asked * step, asked, len(self.asked), seed)
        return [
            *(self._captions(self.captioned[i], draw) for i in first),
            *(self._questions(self.asked[i], draw) for i in second),
        ]

    def photographs(self, start: int, count: int, seed: int) -> list[int]:
        """Numbers of captioned photographs: `count` of an endless sequence, from `start`."""
        return _turn(start, count, len(self.captioned), seed)

    def place(self, number: int) -> int:
        """Where a captioned photograph's features are."""
        return self.images[self.captioned[number].group]

    def spoken(self) -> list[set[int]]:
        """For each captioned photograph the ids that its captions hold."""
        return [
            {i for answer in example.answers for i in self._ids(" " + answer.strip())}
            for example in self.captioned
        ]

    def _captions(self, example: Example, draw: random.Random) -> Row:
        captions = draw.sample(example.answers, len(example.answers))
        if draw.random() < 0.05:
            rounds = list(zip(ROUNDS, captions, strict=False))
            texts: tuple[Text, ...] = (self._text(rounds),)
        else:
            texts = tuple(self._text([(example.prompt, caption)]) for caption in captions)
        return Row(self.images[example.group], texts)

    def _questions(self, examples: list[Example], draw: random.Random) -> Row:
        chosen = draw.sample(examples, min(len(examples), 8))
        rounds = [(example.prompt, draw.choice(example.answers)) for example in chosen]
        if draw.random() < 0.15:
            texts: tuple[Text, ...] = (self._text(rounds[:3]),)
        else:
            texts = tuple(self._text([turn]) for turn in rounds)
        # A question's row has few answer tokens beside a caption's.
        return Row(self.images[examples[0].group], texts, weight=2.0)

    def _text(self, rounds: Sequence[tuple[str, str]]) -> Text:
        return Text.of(rounds, self._ids, self.end)


def _turn(start: int, count: int, size: int, seed: int) -> list[int]:
    """`count` of an endless sequence that goes through 0..size-1 in a new order each time."""
    numbers = []
    for n in range(start, start + count):
        epoch, place = divmod(n, size)
        order = list(range(size))
        random.Random(f"{seed}:{epoch}:{size}").shuffle(order)
        numbers.append(order[place])
    return numbers
