"""Which images an adapter was trained and calibrated on, so that no figure comes from them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from offramp.core.errors import DataError
from offramp.inputs.example import Example
from offramp.inputs.image import content_digest, pixel_digest

log = logging.getLogger(__name__)

Seen = Mapping[str, Sequence[str]]
"""Digests of the images' pixels, sorted, by the step that used them: "train", "calibration".

Adapters of earlier versions hold digests of files; both are looked for."""

DIGITS = 16
"""Hex digits kept of a digest: a million images hold two of the same less than once in 10^7."""


def source_digest(source: str) -> str:
    """Return the digest of an image's source (`Example.source`)."""
    return hashlib.sha256(f"source {source}".encode()).hexdigest()[:DIGITS]


def _digests(examples: Sequence[Example]) -> list[tuple[str, ...]]:
    """Digests of each example's pixels, of its file and, where it names one, of its source; an
    image is read once, however many questions are asked about it."""
    read: dict[Any, tuple[str, str]] = {}
    digests = []
    for example in examples:
        name = example.image if isinstance(example.image, Path) else id(example.image)
        if name not in read:
            file = content_digest(example.image)[:DIGITS]
            # A prompt without an image is known by its text.
            pixels = file if example.is_text else pixel_digest(example.open_image())[:DIGITS]
            read[name] = pixels, file
        source = (source_digest(example.source),) if example.source else ()
        digests.append((*read[name], *source))
    return digests


def picture_digests(examples: Sequence[Example]) -> dict[str, str]:
    """Return the key of the first example for each distinct image, by the digest of its pixels, and
    for each source of images, by the source's digest.

    Raises:
        StorageError: an image file cannot be read. DataError: it is no image.
    """
    keys: dict[str, str] = {}
    for (pixels, _, *source), example in zip(_digests(examples), examples, strict=True):
        for digest in (pixels, *source):
            keys.setdefault(digest, example.key)
    return keys


def unseen(seen: Seen, examples: Sequence[Example], steps: Sequence[str]) -> list[bool]:
    """Return for each example whether its image is new to all of these `steps`.

    Raises:
        StorageError: an image file cannot be read. DataError: it is no image.
    """
    used = {digest for step in steps for digest in seen.get(step, ())}
    return [used.isdisjoint(digests) for digests in _digests(examples)]


def check_no_overlap(
    seen: Seen, examples: Sequence[Example], steps: Sequence[str], advice: str
) -> None:
    """Raise `DataError`, with `advice`, where an image was used in one of the `steps`.

    An adapter without the digests of its training images gets a warning.
    """
    if "train" not in seen:
        log.warning(
            "The adapter does not say which images it was trained on; make sure that these are "
            "others."
        )
    if not any(seen.get(step) for step in steps):
        return
    digests = _digests(examples)
    for step in steps:
        used = set(seen.get(step, ()))
        shared: dict[str, str] = {}
        for known, example in zip(digests, examples, strict=True):
            if not used.isdisjoint(known):
                shared.setdefault(known[0], example.key)
        if shared:
            purpose = {"train": "training", "calibration": "calibration"}[step]
            pictures = {pixels for pixels, *_ in digests}
            raise DataError(
                f"{len(shared)} of {len(pictures)} images were used in {purpose}, for instance "
                f"that of example {next(iter(shared.values()))!r}.",
                advice,
            )
