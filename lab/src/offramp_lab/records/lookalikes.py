"""Images of a kind that look alike and are not copies: charts, pages of text, forms filled in."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

WORDS = ("exits", "layer", "of", "a", "decoder", "reads", "what", "tokens", "said", "before", "in")


def chart(seed: int) -> Image.Image:
    """A line between the same axes."""
    draw = np.random.default_rng(seed)
    image = Image.new("RGB", (480, 360), "white")
    pen = ImageDraw.Draw(image)
    pen.line([(50, 20), (50, 320), (460, 320)], fill="black", width=2)
    for tick in range(5):
        pen.text((15, 310 - 70 * tick), f"{tick * 10}", fill="black")
    heights = np.clip(170 + 14 * draw.normal(size=40).cumsum(), 25, 315)
    points = [(55 + 10 * x, float(y)) for x, y in enumerate(heights)]
    pen.line(points, fill="blue", width=2)
    return image


def page(seed: int) -> Image.Image:
    """Lines of words."""
    draw = np.random.default_rng(seed)
    image = Image.new("RGB", (600, 780), "white")
    pen = ImageDraw.Draw(image)
    for line in range(40):
        pen.text((50, 50 + 17 * line), " ".join(draw.choice(WORDS, 14))[:80], fill="black")
    return image


def form(seed: int) -> Image.Image:
    """The same fields, and a number of six digits in one of them."""
    image = Image.new("RGB", (600, 780), "white")
    pen = ImageDraw.Draw(image)
    for field in range(14):
        pen.text((50, 60 + 48 * field), f"Field number {field}:", fill="black")
        pen.rectangle((220, 54 + 48 * field, 540, 80 + 48 * field), outline="black")
    number = np.random.default_rng(seed).integers(10**5, 10**6)
    pen.text((230, 60 + 48 * 6), str(number), fill="black", font_size=16)
    return image


KINDS: dict[str, Callable[[int], Image.Image]] = {"charts": chart, "pages": page, "forms": form}


@cache
def images(kind: str, n: int) -> list[Image.Image]:
    return [KINDS[kind](seed) for seed in range(n)]
