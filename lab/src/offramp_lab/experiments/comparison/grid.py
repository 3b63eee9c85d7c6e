"""Every point of a comparison: exits trained by each objective, and each policy's thresholds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.confidence import HEADS
from offramp.core.decoding.policy import ExitPolicy, Thresholds
from offramp.core.models.exits import Exits, ExitSet, propose_depths
from offramp.inputs.example import Example
from offramp.training.feature_dataset import Stores
from offramp.training.trainer import Trainer
from offramp_lab.experiments.comparison.points import Entry, PointMeasurer
from offramp_lab.experiments.comparison.tradeoff import FREE

log = logging.getLogger(__name__)


class Grid:
    """The points of the measurer's plan; exits are trained on `train` when they are asked for, into
    the run's folder, `out`."""

    def __init__(self, measurer: PointMeasurer, train: Sequence[Example], out: Path) -> None:
        self.measurer, self.plan, self.train, self.out = measurer, measurer.plan, train, out
        self._labelled = all(example.answers for example in train)
        self._stores: dict[Any, Stores] = {}
        self._adapters: dict[Any, Adapter] = {}

    def entries(self) -> list[Entry]:
        """Every point of the grid, seed by seed."""
        first = self.plan.training.seed
        return [e for seed in range(first, first + self.plan.seeds) for e in self._grid(seed)]

    def _grid(self, seed: int) -> list[Entry]:
        layers, plan = self.measurer.backbone.depth, self.plan
        curve = partial(self._curve, seed)
        depths = plan.depths or propose_depths(layers)
        several = plan.several or propose_depths(layers, min(3, layers - 1))
        entries = [
            entry
            for objective in plan.others(labelled=self._labelled)
            for entry in curve(objective, "max_probability", depths)
        ]
        for policy in dict.fromkeys(("max_probability", *plan.policies)):
            if policy not in HEADS:
                entries += curve(FREE, policy, depths)
            entries += curve(FREE, policy, several)
        there = {(entry.objective, entry.policy) for entry in entries}
        for objective, policy in dict.fromkeys(plan.pairs):
            if (objective, policy) not in there:
                entries += curve(objective, policy, several)
        for store in (store for pair in self._stores.values() for store in pair):
            store.clear()
        self._stores = {}
        return entries

    def _curve(
        self, seed: int, objective: str, policy: str, depths: tuple[int, ...]
    ) -> list[Entry]:
        if (key := (seed, objective, depths)) not in self._adapters:
            self._adapters[key] = self._trained(*key)
        adapter = self._adapters[key]
        rule = ExitPolicy(
            score=policy,
            first=None if self.plan.exit_in_prefill else {},
            shortlist=adapter.policy.shortlist,
        )
        if policy == "agreement":
            adapter = _weighed(adapter)
        levels = self._levels(adapter, rule)
        rules = [replace(rule, thresholds=Thresholds.shared(depths, t)) for t in levels]
        return [Entry(seed, objective, policy, adapter, r) for r in rules]

    def _levels(self, adapter: Adapter, rule: ExitPolicy) -> list[float]:
        """Thresholds that spread what exits: quantiles of scores, or the steps of an
        agreement."""
        depths = adapter.exits.depths
        if rule.score == "patience":
            return [n / (len(depths) - 1) for n in range(1, len(depths))]
        if rule.score == "agreement":
            weights = np.array([adapter.exits.measured["weights"][d] for d in depths])
            steps = weights.cumsum() / weights.sum()
            return sorted({float(s * p) for s in steps for p in (0.8, 0.95, 0.99)})
        measurer = self.measurer
        probe = measurer.encoder.prompts(measurer.sample(self.plan.batch_size))
        scores: list[float] = []
        for depth in depths:
            sure = replace(rule, thresholds=Thresholds({depth: 1.0}))
            answers = measurer.answers(adapter, sure, [probe])
            scores += [s for answer in answers for s in answer.scores if s == s]
        return sorted({float(np.quantile(scores, q)) for q in self.plan.quantiles})

    def _trained(self, seed: int, objective: str, depths: tuple[int, ...]) -> Adapter:
        """The objective's exits; what was trained before is taken up."""
        backbone, encoder = self.measurer.backbone, self.measurer.encoder
        changes = self.plan.changes(objective)
        if changes is None:
            return Adapter(backbone, ExitSet(Exits(backbone, depths, kind="lens")))
        if changes.get("regime") == "supervised" and not self._labelled:
            changes = {**changes, "regime": "pseudo", "min_confidence": 0.0}
        config = replace(self.plan.training, **{**changes, "depths": depths, "seed": seed})
        folder = exits_folder(self.out, seed, objective, depths)
        trainer = Trainer(backbone, encoder.processor, self.train, config, folder)
        log.info(f"seed {seed}: {objective} exits at {list(depths)}")
        return trainer.run(resume=True, recorded=self._stores)


def _weighed(adapter: Adapter) -> Adapter:
    """The adapter whose exits weigh as much as they are right."""
    right = adapter.metrics["agreement"].items()
    weights = {int(d): max(share, 1e-3) for d, share in right}  # not all may be 0
    measured = {**adapter.exits.measured, "weights": weights}
    return replace(adapter, exits=replace(adapter.exits, measured=measured))


def exits_folder(out: Path, seed: int, objective: str, depths: Sequence[int]) -> Path:
    """Where a comparison keeps what an objective trained."""
    return out / "exits" / f"{objective}-{'-'.join(map(str, depths))}-seed-{seed}"
