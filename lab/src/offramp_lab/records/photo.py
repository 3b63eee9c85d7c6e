"""The model on photographs that records are of: the photo model that ships, with its exits, or one
that `python -m examples.photo_vlm.build` made."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from examples.photo_vlm import caption
from examples.photo_vlm.rows import half_of, read_photographs

from offramp.adapter import Adapter
from offramp.data.example import Example
from offramp.models.shipped import is_photo, shipped_exits

PHOTO = Path("photo")


def add_photo(parser: argparse.ArgumentParser, default: Path | None = PHOTO) -> None:
    """Options `--photo` and `--adapter`."""
    parser.add_argument(
        "--photo", "--model", type=Path, default=default, metavar="MODEL",
        help="photo, or the folder of a built model (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--adapter", type=Path, metavar="FOLDER", help="exits (default: those of the model)"
    )


def exits_of(model: Path, adapter: Path | None = None) -> Path:
    """The folder of its exits: those asked for, or those that are kept with it."""
    if adapter is not None:
        return adapter
    shipped = shipped_exits("photo") if is_photo(str(model)) else caption.ADAPTER
    assert shipped is not None, "the photo model is there"
    return shipped


def load_photo(
    model: Path,
    adapter: Path | None = None,
    dtype: torch.dtype = torch.float32,
    quantize: str | None = None,
    vision: str = "torch",
) -> tuple[Adapter, Any]:
    """The model with exits, and its encoder. vision: what runs the tower."""
    backbone, encoder = caption.load(model, dtype, quantize, vision)
    return Adapter.load(exits_of(model, adapter), backbone), encoder


def halves(data: Path, split: str = "captions_val") -> tuple[list[Example], list[Example]]:
    """Held-out photographs: to choose thresholds on, and to measure on."""
    held = read_photographs(data)[split]
    choosing, measuring = ([e for e in held if half_of(e) == half] for half in (0, 1))
    return choosing, measuring
