"""Projectors (mmproj) of tiny random families, and what a family's processor makes of the same
pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import families
import numpy as np
import torch
from hub_files import WORDS
from torch import Tensor

from offramp.core.models.backbone import Backbone
from offramp_llama_cpp.vision_export import Looks, export_vision

FRAMES = {
    "qwen": {4: "<|vision_start|>", 5: "<|vision_end|>"},
    "gemma3": {4: "<start_of_image>", 5: "<end_of_image>"},
    "smolvlm": {4: "<fake_token_around_image>", 5: "<global-img>", 7: "<row_1_col_1>", 95: "ĊĊ"},
}
"""What libmtmd writes around images."""
SIZES = {"qwen": ((144, 32), (32, 64)), "gemma3": ((28, 28),) * 2, "smolvlm": ((32, 32),) * 2}
"""Width and height of two pictures that need no resizing: Qwen takes from 8 tokens on, and the
first is wider than a window of its tower."""

LOOKS = Looks((0.5,) * 3, (0.5,) * 3)


def kind_of(name: str) -> str:
    return name.partition("2")[0].partition("3-")[0] if name.startswith("qwen") else name


def words_of(name: str) -> list[str]:
    named = FRAMES[kind_of(name)]
    return [named.get(n, word) for n, word in enumerate(WORDS)]


def pictures(name: str) -> list[np.ndarray[Any, Any]]:
    """[H, W, 3], of bytes."""
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in SIZES[kind_of(name)]]


def inputs_of(name: str, ids: Sequence[int], shown: Sequence[Any]) -> dict[str, Tensor]:
    """What the model's own processor returns for token ids with pictures between them, each behind
    the word that opens it."""
    kind = kind_of(name)
    tokens = [_tokens(kind, picture) for picture in shown for _ in range(1 + (kind == "smolvlm"))]
    row: list[int] = []
    opens = {"qwen": (4,), "gemma3": (4,), "smolvlm": (5, 7)}[kind]
    for token in ids:
        row.append(token)
        if token in opens:
            row += [families.IMAGE] * tokens.pop(0)
    assert not tokens
    input_ids = torch.tensor([row])
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    images = (input_ids == families.IMAGE).int()
    values = [torch.from_numpy(each.transpose(2, 0, 1) / 127.5 - 1).float() for each in shown]
    if kind == "qwen":
        grids = [[1, each.shape[1] // 8, each.shape[2] // 8] for each in values]
        return inputs | {
            "pixel_values": torch.cat([_patches(each) for each in values]),
            "image_grid_thw": torch.tensor(grids),
            "mm_token_type_ids": images,
        }
    if kind == "gemma3":
        return inputs | {"pixel_values": torch.stack(values), "token_type_ids": images.long()}
    pixels = torch.stack([each for each in values for _ in range(2)])[None]  # whole, and its tile
    return inputs | {
        "pixel_values": pixels,
        "pixel_attention_mask": torch.ones_like(pixels[:, :, 0], dtype=torch.bool),
    }


def _tokens(kind: str, picture: Any) -> int:
    return picture.shape[0] * picture.shape[1] // 16**2 if kind == "qwen" else 4


def _patches(pixels: Tensor) -> Tensor:
    """As Qwen's processor lays them out: the four that are merged stand together."""
    _, height, width = pixels.shape
    frames = pixels[None].expand(2, -1, -1, -1)
    split = frames.reshape(2, 3, height // 16, 2, 8, width // 16, 2, 8)
    return split.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(-1, 3 * 2 * 8 * 8)


def write_projector(backbone: Backbone, path: Path, formats: str = "f32") -> Path:
    """What `offramp export --vision` writes."""
    export_vision(backbone, path, formats, LOOKS)
    return path
