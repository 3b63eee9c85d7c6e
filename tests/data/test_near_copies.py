"""Laws of copies: an image encoded again or resized is one, and one that looks alike is none."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from offramp.data import near_copies as near
from offramp.data.near_copies import near_copies
from offramp.data.scenes import world
from offramp.inputs.example import Example
from offramp.inputs.image import open_rgb, pixel_digest
from offramp_lab.records import lookalikes


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


@pytest.mark.slow
@pytest.mark.parametrize("kind", lookalikes.KINDS)
def test_images_that_look_alike_are_no_copies(kind: str) -> None:
    assert near_copies(examples(lookalikes.images(kind, 40))) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*lookalikes.KINDS, "scenes"])
def test_copies_are_found_among_images_that_look_alike(kind: str) -> None:
    if kind == "scenes":
        others = [world.render(world.scene("test", i)) for i in range(12)]
    else:
        others = lookalikes.images(kind, 12)
    for place, copy in enumerate(copies(others[0])):
        found = near_copies(examples([*others, copy]))
        assert found == [(0, len(others))], (kind, place)


def test_scans_of_one_form_are_compared_with_few_and_their_copies_found(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Pairs of n alike images are n^2 / 2; each is compared with those most like it alone."""
    monkeypatch.setattr(near, "MOST_SHARP", 2)
    forms = lookalikes.images("forms", 30)
    again = [encoded(forms[7], "jpeg", quality=50), encoded(forms[20], "webp", quality=80)]
    assert near_copies(examples([*forms, *again])) == [(7, 30), (20, 31)]
    assert "pairs of images look alike; the nearest" in caplog.text
    monkeypatch.setattr(near, "MOST_SMALL", 12)
    pairs = near._nearest(np.stack([near.Look.of(image).thumbnail for image in forms]))
    assert len(pairs) <= 30 * 12 and (pairs[:, 0] < pairs[:, 1]).all()


def test_pairs_are_those_within_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    thumbnails = draw.normal(100, 2, (40, 192)).astype(np.float32)
    apart = np.sqrt(((thumbnails[:, None] - thumbnails[None]) ** 2).mean(-1))
    monkeypatch.setattr(near, "NEAR", float(np.median(apart)))
    expected = np.argwhere(np.triu(apart <= near.NEAR, 1))
    assert np.array_equal(near._nearest(thumbnails), expected)


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
