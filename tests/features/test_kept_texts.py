"""Laws of texts that are kept: what the whole processor would make, bit for bit."""

from __future__ import annotations

from typing import Any

import fakes
import pytest
import torch
from PIL import Image

from offramp.features import kept_texts
from offramp.features.input_processor import InputProcessor
from offramp.inputs.example import Example

SIZES = ((28, 28), (40, 31), (64, 28), (29, 90), (28, 28))


class Counted:
    """A processor, and how often it was called. tiles: whether it cuts wide images; more: whether
    it returns more than text and pixels."""

    def __init__(self, *, tiles: bool = False, more: bool = False) -> None:
        self.tokenizer = fakes.word_level()
        self.tiles, self.more, self.calls = tiles, more, 0

    def image_processor(self, images: Any, return_tensors: str) -> dict[str, Any]:
        image = images
        while isinstance(image, list):
            (image,) = image
        count = image.width // 28 if self.tiles else 1
        drawn = torch.Generator().manual_seed(sum(image.getpixel((0, 0))))
        return {"pixel_values": torch.rand(count, 3, 4, 4, generator=drawn)}

    def __call__(
        self, images: Any, text: Any, padding: bool, return_tensors: str
    ) -> dict[str, Any]:
        self.calls += 1
        if isinstance(images, list) and len(images) > 1:
            parts = [self.image_processor(image, "pt")["pixel_values"] for image in images]
            pixels = torch.cat(parts)
        else:
            pixels = self.image_processor(images, "pt")["pixel_values"]
        rows = [[3] * len(pixels) + self.tokenizer(t)["input_ids"] for t in text]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        made = {"input_ids": ids, "attention_mask": (ids > 0).long(), "pixel_values": pixels}
        return {**made, "image_sizes": torch.tensor([[28, 28]])} if self.more else made


def prompts(processor: Any, backbone: Any, texts: Any = ("w10 w11",)) -> tuple[Any, list[Any]]:
    encoder = InputProcessor(backbone, processor)
    made = []
    for number, size in enumerate(SIZES):
        for text in texts:
            picture = Image.new("RGB", size, (number, 7, 9))
            made.append(encoder.prompts([Example(picture, text, ("w20",), f"{number}")]))
    return encoder, made


def same(one: list[Any], other: list[Any]) -> bool:
    return all(
        a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
        for a, b in zip(one, other, strict=True)
    )


def test_a_kept_text_is_what_the_processor_makes_and_is_made_twice(opt: Any) -> None:
    processor = Counted()
    encoder, made = prompts(processor, opt, ("w10 w11", "w12"))
    assert processor.calls == 2 * 2 and encoder.kept_texts.hits == 2 * (len(SIZES) - 2)
    fresh = [prompts(Counted(), opt, (text,))[1] for text in ("w10 w11", "w12")]
    whole = Counted()
    asked = []
    for number, size in enumerate(SIZES):
        for text in ("w10 w11", "w12"):
            image = [[Image.new("RGB", size, (number, 7, 9))]]
            asked.append(whole(image, [encoder.prompt_text(text)], True, "pt"))
    assert same(made, asked) and same(made[::2], fresh[0])


@pytest.mark.parametrize(
    "processor", [Counted(tiles=True), Counted(more=True)], ids=["tiles", "more"]
)
def test_where_the_text_depends_on_the_image_the_processor_is_asked_whole(
    processor: Any, opt: Any
) -> None:
    encoder, made = prompts(processor, opt)
    again = Counted(tiles=processor.tiles, more=processor.more)
    for number, (size, mine) in enumerate(zip(SIZES, made, strict=True)):
        image = [[Image.new("RGB", size, (number, 7, 9))]]
        assert same([mine], [again(image, [encoder.prompt_text("w10 w11")], True, "pt")])


def test_what_is_given_out_is_not_what_is_kept(opt: Any) -> None:
    encoder, made = prompts(Counted(), opt)
    made[-1]["input_ids"].zero_()
    picture = Image.new("RGB", (28, 28), "red")
    after = encoder.prompts([Example(picture, "w10 w11", ("w20",), "x")])
    assert torch.equal(after["input_ids"], made[0]["input_ids"])


def test_few_texts_are_kept(opt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_texts, "MOST", 3)
    encoder, _ = prompts(Counted(), opt, [f"w{number}" for number in range(10, 20)])
    assert encoder.kept_texts.hits == 0  # all were dropped before they came again
    assert len(encoder.kept_texts._kept) == 3
