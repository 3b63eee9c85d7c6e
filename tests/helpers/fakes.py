"""Processors, examples and backbones for the laws of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import families
import numpy as np
import pytest
import torch
from families import BOS, EOS, FIRST_WORD, IMAGE, PAD, VOCABULARY
from PIL import Image

from offramp.inputs.example import Example

NEEDS_BF16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="this processor multiplies no bfloat16: what stands in for it rounds by the rows beside",
)

_SPECIAL = {PAD: "<pad>", BOS: "<s>", EOS: "</s>", IMAGE: "<image>"}


def word_level() -> Any:
    """A tokenizer whose word "w8" has id 8, and so on to the end of the tiny vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {_SPECIAL.get(i, f"w{i}"): i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w7"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="w7",
    )


class Blip2FakeProcessor:
    """What a family's processor returns. The name says that it places the image tokens itself."""

    def __init__(self, name: str) -> None:
        self.kind = families.KINDS[name]
        self.tokenizer = word_level()

    def __call__(
        self, images: Sequence[Image.Image], text: Sequence[str], padding: bool, return_tensors: str
    ) -> dict[str, torch.Tensor]:
        before, after = self.kind.frame
        head = [*before, *[IMAGE] * self.kind.images, *after]
        rows = [[*head, *self.tokenizer(t, add_special_tokens=False)["input_ids"]] for t in text]
        longest = max(map(len, rows))
        left = self.kind.padding == "left"
        padded, masks = [], []
        for ids in rows:
            gap = longest - len(ids)
            padded.append([PAD] * gap + ids if left else ids + [PAD] * gap)
            masks.append([0] * gap + [1] * len(ids) if left else [1] * len(ids) + [0] * gap)
        ids, mask = torch.tensor(padded), torch.tensor(masks)
        extras = [
            self._extra(image, ids[i : i + 1], mask[i : i + 1]) for i, image in enumerate(images)
        ]
        extra = {name: torch.cat([e[name] for e in extras]) for name in extras[0]}
        return {"input_ids": ids, "attention_mask": mask, **extra}

    def _extra(self, image: Image.Image, ids: Any, mask: Any) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(sum(image.getpixel((0, 0))))
        return self.kind.extra(ids, mask, draw)


class ZooFakeProcessor:
    """What the processor of a type in `zoo` returns, of any picture."""

    def __init__(self, name: str, model: Any) -> None:
        self.name, self.model, self.tokenizer = name, model, word_level()

    def __call__(
        self, images: Sequence[Any], text: Sequence[str], padding: bool, return_tensors: str
    ) -> dict[str, torch.Tensor]:
        from zoo.inputs import IMAGES, by_signature

        words = [self.tokenizer(t, add_special_tokens=False)["input_ids"] for t in text]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return IMAGES.get(self.name, by_signature)(self.model, words)


def picture(number: int) -> Image.Image:
    """A picture that looks like no other; the fake processor reads its first pixel alone."""
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    pixels[0, 0] = (number % 256, number // 256, 0)
    return Image.fromarray(pixels)


def examples(n: int, words: int = 5, seed: int = 0) -> list[Example]:
    """`n` examples with prompts and answers of different lengths, each with its own image."""
    draw = torch.Generator().manual_seed(seed)

    def text(length: int) -> str:
        ids = torch.randint(FIRST_WORD, VOCABULARY, (length,), generator=draw)
        return " ".join(f"w{i}" for i in ids.tolist())

    return [
        Example(picture(i), text(1 + i % 4), (text(1 + (3 * i) % words),), f"e{i}")
        for i in range(n)
    ]
