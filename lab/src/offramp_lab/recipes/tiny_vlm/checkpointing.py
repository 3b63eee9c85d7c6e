"""What both training stages share: schedule, atomic checkpoints, a log of JSON lines."""

import json
import math
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def rate(step: int, steps: int, warmup: int = 200) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to 2%."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


class Training:
    """A module in training and its file, from which it goes on: the module's and the optimiser's
    state, the next step, and seconds so far.

    peak: learning rate. step: the next one. Those of the last checkpoint, where there is one, are
    loaded.
    """

    def __init__(self, module: nn.Module, peak: float, path: Path) -> None:
        self._module, self._peak, self._path = module, peak, path
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        # Decaying norms and biases only hurts.
        groups = [
            {"params": [p for p in self._parameters if p.dim() > 1], "weight_decay": 0.02},
            {"params": [p for p in self._parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self._optim = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), eps=1e-8)
        state = load(path) or {"step": 0, "seconds": 0.0}
        if state["step"]:
            module.load_state_dict(state["model"])
            self._optim.load_state_dict(state["optim"])
        self.step: int = state["step"]
        self._started = time.monotonic() - state["seconds"]
        self._saved = time.monotonic()

    def take(self, share: float, losses: Iterable[Tensor]) -> list[float]:
        """A step down the sum of the losses, at a share of the peak learning rate; their values."""
        for group in self._optim.param_groups:
            group["lr"] = self._peak * share
        self._optim.zero_grad()
        values = []
        for loss in losses:
            loss.backward()
            values.append(loss.item())
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optim.step()
        return values

    def save(self, step: int, last: bool, every: float) -> bool:
        """Write the state behind a step where it is the last one or so many seconds have passed,
        complete or not at all; whether it was written."""
        if not last and time.monotonic() - self._saved <= every:
            return False
        fresh = self._path.with_suffix(".new")
        state = {"model": self._module.state_dict(), "optim": self._optim.state_dict()}
        seconds = time.monotonic() - self._started
        torch.save({**state, "step": step + 1, "seconds": seconds}, fresh)
        os.replace(fresh, self._path)
        self._saved = time.monotonic()
        return True


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
