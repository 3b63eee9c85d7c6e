"""Short runs of training, and what they leave behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes
import families
import torch
from torch import Tensor

from offramp.common.jsonl_log import JsonlLog
from offramp.core.models.backbone import Backbone
from offramp.training.checkpoint import HISTORY
from offramp.training.config import FREE, TrainConfig
from offramp.training.trainer import Trainer

SHORT = TrainConfig(
    exit_kind="layer",
    depths=(2, 4),
    steps=6,
    batch_size=4,
    evaluate_every=2,
    max_new_tokens=4,
    validation_fraction=0.25,
    patience=None,
    **FREE,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "free": {},
    "regression": {"distillation": 0.0, "adversarial": 0.0, "l2": 1.0, "cosine": 1.0},
    "adversary-alone": {"distillation": 0.0, "cross_entropy": 0.0, "adversarial": 1.0},
}
"""Objectives and adversaries, as changes to a configuration."""

SHARED = replace(SHORT, steps=3, evaluate_every=10, adversarial=0.0, regime="supervised")
"""What two processes train together."""


def trainer(
    one: Any, out: Path, config: TrainConfig = SHORT, n: int = 12, name: str = ""
) -> Trainer:
    processor = fakes.Blip2FakeProcessor(name or "blip2-opt")
    return Trainer(one, processor, fakes.examples(n), config, out)


def learnt_beside_the_device(out: Path) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Losses of each step and the exits' weights, of a run on the CPU and of one on the second
    device; in a process of its own, since autograd counts devices at a process's first gradient."""
    import second_device

    second_device.device()
    torch.set_num_threads(1)
    made = []
    for where in ("cpu", second_device.NAME):
        torch.manual_seed(0)
        backbone = Backbone(families.build("blip2-opt").to(where))
        run = trainer(backbone, out / where, replace(SHARED, adversarial=0.5)).run()
        exits = run.exits.modules.state_dict()
        made.append((steps(out / where), {name: t.cpu().numpy() for name, t in exits.items()}))
    return made


def rows(out: Path) -> list[dict[str, Any]]:
    return JsonlLog.read(out / HISTORY)


def steps(out: Path) -> list[dict[str, Any]]:
    return [row for row in rows(out) if "agreement" not in row]


def untrained(run: Trainer) -> dict[str, Tensor]:
    """The exits' parameters before the first step: those of the next layers."""
    layers = {str(d): run.backbone.layers[d].state_dict() for d in run.exits.depths}
    return {f"{d}.{name}": t for d, some in layers.items() for name, t in some.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)
