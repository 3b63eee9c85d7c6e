"""What the processor of each family returns besides ids and mask, from both [B, T]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from offramp_lab.inputs.tiny_families.text import IMAGE, PAD


def square(size: int) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    def pixels(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(len(ids), 3, size, size)}

    return pixels


def with_question(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """InstructBLIP's Q-Former reads the question too, through a tokenizer of its own."""
    words = torch.where(ids > IMAGE, ids, PAD)
    return {
        **square(28)(ids, mask),
        "qformer_input_ids": words,
        "qformer_attention_mask": (words != PAD).long(),
    }


def tiles(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    rows = len(ids)
    return {
        "pixel_values": torch.randn(rows, 1, 3, 32, 32),
        "pixel_attention_mask": torch.ones(rows, 1, 32, 32, dtype=torch.bool),
    }


def crops(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """LLaVA-NeXT sees each image whole and in crops; here one."""
    rows = len(ids)
    return {
        "pixel_values": torch.randn(rows, 2, 3, 28, 28),
        "image_sizes": torch.tensor([[28, 28]] * rows),
    }


def patches(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Qwen's processor flattens the patches of all images and tells their grids apart."""
    rows = len(ids)
    return {
        "pixel_values": torch.randn(rows * 16, 3 * 2 * 8 * 8),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * rows),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def prefix(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {**square(28)(ids, mask), "token_type_ids": torch.zeros_like(ids)}


def blocks(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {**square(28)(ids, mask), "token_type_ids": (ids == IMAGE).long()}
