"""What both training stages share: schedule, atomic checkpoints, a log of JSON lines."""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn


def rate(step: int, steps: int, warmup: int = 200) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to 2%."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def optimiser(module: nn.Module, peak: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only: decaying norms and biases only hurts."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.02},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), eps=1e-8)


def save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint that is complete or not there."""
    fresh = path.with_suffix(".new")
    torch.save(state, fresh)
    os.replace(fresh, path)


def load(path: Path) -> dict[str, Any] | None:
    """The checkpoint at `path`, or None before the first."""
    return torch.load(path, weights_only=True) if path.exists() else None


class Log:
    """Appends JSON lines to a file and shows them on stderr."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started = time.monotonic()

    def __call__(self, **entry: Any) -> None:
        entry["seconds"] = round(time.monotonic() - self.started, 1)
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in entry.items()})
        with self.path.open("a") as file:
            file.write(line + "\n")
        print(line, file=sys.stderr, flush=True)
