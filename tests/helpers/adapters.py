"""Adapters as after some training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.models.exits import Exits, ExitSet

DEPTHS = (2, 4)
POLICY = ExitPolicy({2: 0.02, 4: 0.5}, score="margin")


def trained(backbone: Any, **more: Any) -> Adapter:
    """An adapter whose exits are no longer what they were built as."""
    exits = Exits(backbone, DEPTHS)
    with torch.no_grad():
        for parameter in exits.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    exits.requires_grad_(False)
    return Adapter(
        backbone,
        ExitSet(exits),
        provenance={"command": "offramp train", "seed": 7, "data_digest": "abc"},
        metrics={"agreement": {"2": 0.75, "4": 0.875}, "step": 10},
        **more,
    )


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
