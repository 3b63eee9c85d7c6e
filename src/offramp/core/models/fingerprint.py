"""What identifies a backbone: its sizes, and a sample of the weights of each part."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from offramp.core.models.backbone import Backbone
from offramp.core.models.weights import float_parameters, scheme

Make = Callable[[], Tensor]
"""Makes a tensor when it is called: of a quantised backbone, few at a time have room as floats."""

_SIZES = ("model_type", "layers", "width", "vocabulary", "tensors")
TENSORS, _VALUES = 32, 8
"""Tensors sampled in each part, nearly, and values sampled in each tensor, at most."""
_ALIKE = 0.9
"""Share of a sample that agrees, at least: precisions round differently."""

PARTS = {
    "vision": "vision tower's weights",
    "bridge": "projector's or Q-Former's weights",
    "embeddings": "embeddings' weights",
    "head": "LM head's weights",
}
"""Parts besides the decoder, and what an error calls them."""


_TOGETHER = 0.98
"""Cosine of two samples of one decoder's weights, one of them quantised: in 4 bits above 0.99."""


def fingerprint(backbone: Backbone) -> dict[str, Any]:
    """Return the sizes of a backbone, and sampled weights of its decoder and of each of `PARTS`.

    The sample is read through bfloat16, so that a checkpoint in another precision has (nearly) the
    same one; `same_backbone` allows for the rounding.
    """
    if backbone.identity is not None:
        return dict(backbone.identity)
    decoder = float_parameters(backbone.layers)
    if backbone.norm is not None:
        decoder += float_parameters(backbone.norm)
    held_in = held_as(backbone)
    found: dict[str, Any] = {
        **({} if held_in is None else {"quantized": held_in}),
        "model_type": backbone.model.config.model_type,
        "layers": backbone.depth,
        "width": backbone.width,
        "vocabulary": backbone.vocabulary,
        "tensors": len(decoder),
        "weights": [value for values in sample(decoder) for value in values],
        "parts": {name: sample(tensors) for name, tensors in _parts(backbone).items()},
    }
    if backbone.split:
        backbone.identity = found
    return found


def held_as(backbone: Backbone) -> str | None:
    """Return in words how the weights of the layers are stored; None: as plain floats."""
    if backbone.identity is not None:
        return backbone.identity.get("quantized")
    return scheme(backbone.layers)


def same_backbone(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return in words how two fingerprints differ; None where they are of one backbone.

    Parts that `saved` lacks, as in adapters of early versions, are not compared.
    """
    for key in _SIZES:
        if saved.get(key) != now.get(key):
            return f"{key} is {now.get(key)}, not {saved.get(key)}"
    if saved.get("quantized") != now.get("quantized"):
        return _same_values(saved["weights"], now["weights"])
    pairs = list(zip(saved["weights"], now["weights"], strict=False))
    equal = sum(a == b for a, b in pairs) / max(1, len(pairs))
    if len(saved["weights"]) != len(now["weights"]) or equal < _ALIKE:
        return f"the decoder's weights differ ({equal:.0%} of a sample agree)"
    parts = saved.get("parts", {})
    for name, what in PARTS.items():
        if name in parts and not _same_part(parts[name], now["parts"][name]):
            return f"the {what} differ"
    return None


def _same_values(saved: Sequence[int], now: Sequence[int]) -> str | None:
    """None where two samples are of one decoder in different bits: they go together."""
    if len(saved) != len(now):
        return "the decoder's weights differ"
    pair = torch.tensor([saved, now], dtype=torch.int16).view(torch.bfloat16).double()
    together = float(torch.nn.functional.cosine_similarity(pair[0], pair[1], dim=0))
    return None if together > _TOGETHER else f"the decoder's weights differ ({together:.2f})"


def _same_part(saved: Sequence[Sequence[int]], now: Sequence[Sequence[int]]) -> bool:
    """Whether two samples are of one part: nearly all values agree, and half of each tensor's."""
    if [len(values) for values in saved] != [len(values) for values in now]:
        return False
    equal = [[a == b for a, b in zip(*rows, strict=True)] for rows in zip(saved, now, strict=True)]
    total, every = sum(map(sum, equal)), sum(map(len, equal))
    return total >= _ALIKE * every and all(2 * sum(row) >= len(row) for row in equal)


def dump_fingerprint(fingerprint: Mapping[str, Any]) -> str:
    """Return a fingerprint as one stable line of JSON, for digests."""
    return json.dumps(fingerprint, sort_keys=True, separators=(",", ":"))


def _parts(backbone: Backbone) -> dict[str, list[Make]]:
    """The parameters of each of `PARTS`: the bridge is what no other part and no layer holds."""
    model: Any = backbone.model
    parts = {
        "vision": None if backbone.family.vision is None else backbone.vision,
        "embeddings": model.get_input_embeddings(),
        "head": backbone.head,
    }
    held = [backbone.stack, *(part for part in parts.values() if part is not None)]
    known = {id(it) for part in held for it in (*part.parameters(), *part.modules())}
    tensors = {name: [] if part is None else float_parameters(part) for name, part in parts.items()}
    return {**tensors, "bridge": float_parameters(model, known)}


def sample(tensors: Sequence[Make]) -> list[list[int]]:
    """Up to `_VALUES` evenly spaced values of each of about `TENSORS` evenly spaced tensors, as
    the bits of their bfloat16."""
    samples: list[list[int]] = []
    for make in tensors[:: max(1, len(tensors) // TENSORS)]:
        flat = make().flatten()
        values = flat[:: max(1, flat.numel() // _VALUES)][:_VALUES].cpu()
        samples.append(values.to(torch.bfloat16).view(torch.int16).tolist())
    return samples
