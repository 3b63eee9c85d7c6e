"""The optimizers of a training run, their learning rate, and gradients of several processes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from offramp.training.config import TrainConfig

_FUSED = ("cpu", "cuda", "mps", "xpu")


def build_optimizers(
    exits: nn.Module, discriminators: nn.Module, config: TrainConfig
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Return AdamW for the exits (generator) and for the discriminators."""
    rate, discriminating = config.learning_rate, config.discriminator_learning_rate
    generator = adamw(exits.parameters(), lr=rate, weight_decay=0.01)
    return generator, adamw(discriminators.parameters(), lr=discriminating, betas=(0.5, 0.9))


def adamw(parameters: Iterable[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """Return AdamW, which passes over each parameter once where the device has such a kernel."""
    given = [*parameters]
    fused = all(parameter.device.type in _FUSED for parameter in given)
    return torch.optim.AdamW(given, fused=fused or None, **options)


def set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int) -> None:
    """Set the exits' learning rate at `step`: a linear start, then a cosine down to a twentieth."""
    warm = max(1, min(50, config.steps // 10))
    share = min(1.0, (step + 1) / warm)
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * share * max(0.05, cosine)


def average_gradients(accelerator: Any, module: nn.Module) -> None:
    """Replace the gradients by their mean over processes."""
    if accelerator.num_processes > 1:
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.grad = accelerator.reduce(parameter.grad, "mean")
