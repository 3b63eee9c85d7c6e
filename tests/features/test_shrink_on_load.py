"""Laws of images decoded no larger than a model looks at them: nearly its pixels, where it is
asked for and can be."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from offramp import Example
from offramp.adapter.shipped import load_tiny
from offramp.core.errors import InputError
from offramp.features.input_processor import InputProcessor, smallest_side
from offramp.features.shrink_on_load import TIMES, with_shrink_on_load
from offramp.inputs.image import open_rgb

SIDE = 224


def picture(width: int, height: int) -> Image.Image:
    """A smooth picture, as photographs are at a camera's size."""
    draw = np.random.default_rng(0)
    coarse = Image.fromarray(draw.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(1600, 1200), (900, 1700), (4000, 500), (300, 400)])
def test_each_side_keeps_what_is_asked_for(size: tuple[int, int]) -> None:
    image = encoded(picture(*size))
    whole, shrunk = open_rgb(image, "it"), open_rgb(image, "it", smallest=2 * SIDE)
    if min(size) < 4 * SIDE:  # half of it would be too small
        assert shrunk.tobytes() == whole.tobytes()
        return
    assert shrunk.size < whole.size and min(shrunk.size) >= 2 * SIDE
    looked_at = [
        np.asarray(i.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=float)
        for i in (whole, shrunk)
    ]
    assert np.abs(looked_at[0] - looked_at[1]).mean() < 0.5  # of 255


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_pixels_that_are_rgb_outlive_their_file(kind: str, tmp_path: Path) -> None:
    image = picture(64, 48)
    (tmp_path / "one").write_bytes(encoded(image, kind))
    opened = open_rgb(tmp_path / "one", "it")
    (tmp_path / "one").unlink()
    theirs = Image.open(io.BytesIO(encoded(image, kind)))
    assert opened.mode == "RGB" and opened.tobytes() == theirs.convert("RGB").tobytes()
    again = open_rgb(opened, "it")
    again.putpixel((0, 0), (1, 2, 3))  # whose image it was keeps it
    assert opened.tobytes() == theirs.convert("RGB").tobytes()


def test_it_stands_upright() -> None:
    image = picture(1600, 1200)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = open_rgb(encoded(image, exif=exif), "it", smallest=2 * SIDE)
    assert turned.size == (600, 800)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP"])
def test_what_is_no_jpeg_is_decoded_whole(kind: str) -> None:
    image = encoded(picture(1600, 1200), kind)
    assert open_rgb(image, "it", smallest=64).tobytes() == open_rgb(image, "it").tobytes()


def test_the_limit_is_of_the_files_pixels() -> None:
    from offramp.inputs.image import ImageTooLargeError

    with pytest.raises(ImageTooLargeError, match="1600 x 1200"):
        open_rgb(encoded(picture(1600, 1200)), "it", pixels=1_000_000, smallest=64)


# -- processors ------------------------------------------------------------------------------------


def test_a_processor_says_how_small_and_stays_as_it_was(tmp_path: Path) -> None:
    backbone, processor = load_tiny("opt")
    shrinking = with_shrink_on_load(processor)
    side = processor.image_processor.size["height"]
    assert (smallest_side(processor), smallest_side(shrinking)) == (None, TIMES * side)
    file = tmp_path / "photo.jpg"
    file.write_bytes(encoded(picture(1600, 1200)))
    example = Example(file, "Caption:", (), key="photo")
    opened: list[tuple[int, int]] = []
    for made in (processor, shrinking):
        encoder = InputProcessor(backbone, made)
        opened.append(example.open_image(encoder.smallest_side).size)
        assert encoder.prompts([example])["pixel_values"].shape[-1] == side
    assert opened == [(1600, 1200), (200, 150)]


def test_those_that_crop_keep_what_they_resize_to() -> None:
    from transformers import CLIPImageProcessor

    look = CLIPImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224})
    assert smallest_side(with_shrink_on_load(_Holds(look))) == TIMES * 256


@pytest.mark.parametrize("kind", ["LlavaNext", "Qwen2VL", "SmolVLM", "GotOcr2"])
def test_those_that_tile_are_refused(kind: str) -> None:
    import transformers

    more = {"crop_to_patches": True} if kind == "GotOcr2" else {}
    look = getattr(transformers, f"{kind}ImageProcessor")(**more)
    with pytest.raises(InputError, match="looks at large images in parts") as error:
        with_shrink_on_load(_Holds(look))
    assert "--shrink-on-load" in error.value.remedy


def test_a_tokenizer_is_refused() -> None:
    with pytest.raises(InputError, match="reads no images"):
        with_shrink_on_load(_Holds(None))


class _Holds:
    """A processor, as far as its images go."""

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor


# -- where it is used ------------------------------------------------------------------------------


def test_a_server_decodes_no_more_than_it_needs() -> None:
    from offramp.serving.server.config import ImageLimits
    from offramp.serving.server.inputs.images import ImageSource

    image = encoded(picture(1600, 1200))
    assert ImageSource.of(ImageLimits()).decode(image).size == (1600, 1200)
    assert ImageSource.of(ImageLimits(), smallest=100).decode(image).size == (200, 150)


def test_commands_take_it(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "photo.jpg"
    file.write_bytes(encoded(picture(1600, 1200)))
    code, out, _ = run(
        "generate", "--adapter", "tiny-opt", "--image", file, "--shrink-on-load", "--json"
    )
    assert code == 0 and '"answer"' in out
