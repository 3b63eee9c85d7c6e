"""Laws of copies: an image encoded again or resized is one, and one that looks alike is none."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from PIL import Image

from offramp.data.example import Example
from offramp.data.image import open_rgb, pixel_digest
from offramp.data.near_copies import near_copies
from offramp.data.scenes import world
from offramp_lab.inputs import lookalikes


def examples(images: list[Image.Image]) -> list[Example]:
    return [Example(image, "Caption:", (), f"e{i}") for i, image in enumerate(images)]


def encoded(image: Image.Image, format: str, **how: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, format, **how)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def copies(image: Image.Image) -> Iterator[Image.Image]:
    width, height = image.size
    yield encoded(image, "jpeg", quality=50)
    yield encoded(image, "webp", quality=80)
    yield image.resize((width // 2, height // 2), Image.Resampling.LANCZOS)
    yield image.resize((2 * width, 2 * height), Image.Resampling.BICUBIC)
    dotted = image.copy()
    dotted.putpixel((width // 2, height // 2), (255, 0, 255))
    yield dotted
    yield encoded(image.resize((width * 7 // 10, height * 7 // 10)), "jpeg", quality=60)


@pytest.mark.parametrize("kind", lookalikes.KINDS)
def test_images_that_look_alike_are_no_copies(kind: str) -> None:
    assert near_copies(examples(lookalikes.images(kind, 40))) == []


@pytest.mark.parametrize("kind", [*lookalikes.KINDS, "scenes"])
def test_copies_are_found_among_images_that_look_alike(kind: str) -> None:
    if kind == "scenes":
        others = [world.render(world.scene("test", i)) for i in range(12)]
    else:
        others = lookalikes.images(kind, 12)
    for place, copy in enumerate(copies(others[0])):
        found = near_copies(examples([*others, copy]))
        assert found == [(0, len(others))], (kind, place)


def test_a_digest_of_pixels_knows_no_file() -> None:
    image = lookalikes.chart(1)
    files = [io.BytesIO() for _ in range(4)]
    image.save(files[0], "png", compress_level=1)
    image.save(files[1], "png", compress_level=9)
    exif = Image.Exif()
    exif[0x010E] = "a description"
    image.save(files[2], "png", exif=exif)
    exif[0x0112] = 6  # shown a quarter turned
    image.transpose(Image.Transpose.ROTATE_90).save(files[3], "png", exif=exif)
    opened = [Image.open(io.BytesIO(file.getvalue())) for file in files]
    digests = {pixel_digest(open_rgb(one, "an image")) for one in [image, *opened]}
    assert len({file.getvalue() for file in files}) == 4 and len(digests) == 1
    assert pixel_digest(lookalikes.chart(2)) not in digests
