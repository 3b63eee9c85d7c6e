"""What a prompt consists of: text alone, an image, several images, a video, audio."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Modality = tuple[str, ...]
"""Names of what comes beside the text, sorted; empty for text alone."""
SEVERAL = "several"
"""Stands for a second image of one prompt."""
_OF_TEXT = ("attention_mask", "decoder_attention_mask", "inputs_embeds", "cross_attention_mask")
_IMAGE_TOKENS = ("image_token_id", "image_token_index")


def modality_of(config: Any, inputs: Mapping[str, Any]) -> Modality:
    """Return what the prompts of `inputs` consist of.

    config: of the model, which names the token that stands for an image. inputs: tensors by name,
    as a processor returns them. Prompts whose modality is the same are run by the same code.
    """
    names = {
        name
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point() and name not in _OF_TEXT
    }
    if not names:
        return ()
    ids = inputs.get("input_ids")
    tokens = (getattr(config, name, None) for name in _IMAGE_TOKENS)
    token = next((each for each in tokens if isinstance(each, int)), None)
    if token is not None and isinstance(ids, Tensor) and _most_runs(ids == token) > 1:
        names.add(SEVERAL)
    return tuple(sorted(names))


def _most_runs(marked: Tensor) -> int:
    """The largest number of runs of True in a row of `marked` [B, T]."""
    before = torch.cat([torch.zeros_like(marked[:, :1]), marked[:, :-1]], 1)
    return int((marked & ~before).sum(1).max()) if marked.numel() else 0
