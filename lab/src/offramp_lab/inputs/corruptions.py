"""Corrupted images at five severities, to see what exits do on what they were not trained for.

Four of the corruptions of Hendrycks and Dietterich 2019, with their strengths, which were set on
images of 224 pixels; blur is in pixels and scales with the shorter side. torchvision's blur,
noise and contrast are other functions (another kernel, another generator, one mean for all
channels): the records would not be those of these images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from offramp.core.errors import InputError, check_known
from offramp.inputs.example import Example, picture_of

SEVERITIES = (1, 2, 3, 4, 5)
_REFERENCE_SIDE = 224  # pixels
_MODES = ("L", "RGB")

Corruption = Callable[[Image.Image, int, np.random.Generator], Image.Image]
"""A corrupted copy of an L or RGB image; severity from 0 here; same size and mode."""


def _blur(picture: Image.Image, severity: int, _: np.random.Generator) -> Image.Image:
    deviation = (1.0, 2.0, 3.0, 4.0, 6.0)[severity]
    return picture.filter(ImageFilter.GaussianBlur(deviation * min(picture.size) / _REFERENCE_SIDE))


def _noise(picture: Image.Image, severity: int, draw: np.random.Generator) -> Image.Image:
    pixels = _pixels(picture)
    deviation = (0.08, 0.12, 0.18, 0.26, 0.38)[severity]
    return _picture(pixels + draw.normal(0.0, deviation, pixels.shape))


def _jpeg(picture: Image.Image, severity: int, _: np.random.Generator) -> Image.Image:
    from torchvision.transforms.v2 import JPEG, functional

    damaged = JPEG((25, 18, 15, 10, 7)[severity])(functional.pil_to_tensor(picture))
    return functional.to_pil_image(damaged)  # type: ignore[no-any-return]


def _contrast(picture: Image.Image, severity: int, _: np.random.Generator) -> Image.Image:
    pixels = _pixels(picture)
    mean = pixels.mean(axis=(0, 1), keepdims=True)
    return _picture(mean + (pixels - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[severity])


CORRUPTIONS: dict[str, Corruption] = {
    "blur": _blur,
    "noise": _noise,
    "jpeg": _jpeg,
    "contrast": _contrast,
}


def corrupt(picture: Image.Image, name: str, severity: int, seed: int) -> Image.Image:
    """A corrupted copy, same size and mode.

    name: of `CORRUPTIONS`. severity: 1 (mild) to 5. seed: same seed, same pixels.

    Raises:
        InputError: an unknown name or severity, or an image that is neither L nor RGB.
    """
    check_known("Corruption", [name], tuple(CORRUPTIONS))
    if severity not in SEVERITIES:
        raise InputError(
            f"Severity {severity!r} is not known.", "Give a whole number from 1 (mild) to 5."
        )
    if picture.mode not in _MODES:
        raise InputError(
            f"A picture of mode {picture.mode} cannot be corrupted.",
            "Convert it first: picture.convert('RGB').",
        )
    return CORRUPTIONS[name](picture, severity - 1, np.random.default_rng(seed))


def corrupted(example: Example, name: str, severity: int, seed: int) -> Example:
    """The same question about a corrupted image, in the same group as the whole one.

    Examples about one image see the same corruption; that of two images is drawn apart.
    """
    group = picture_of(example)
    own = hashlib.sha256(f"{seed}:{group}".encode()).digest()
    damaged = corrupt(example.open_image(), name, severity, int.from_bytes(own[:8], "big"))
    return replace(example, image=damaged, key=f"{example.key} {name}-{severity}", group=group)


def _pixels(picture: Image.Image) -> npt.NDArray[np.float64]:
    """Values in [0, 1], [H, W] or [H, W, 3]."""
    return np.asarray(picture, dtype=np.float64) / 255


def _picture(pixels: npt.NDArray[np.float64]) -> Image.Image:
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))
