"""The two players of FREE training, and what each of them loses on a batch.

The generator is the exits: their features should pass for the final layer's, and read as it does.
The discriminators tell the two apart. Nothing here moves a weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from offramp.backbone import Backbone
from offramp.config import TrainConfig
from offramp.discriminator import build_discriminators
from offramp.exits import Exits
from offramp.features import Batch, exit_features
from offramp.losses import LOSSES, Terms, discriminator_loss, masked_mean


class Game:
    """Exits and discriminators on a backbone, both trained in float32, beside any precision."""

    def __init__(self, backbone: Backbone, depths: Sequence[int], config: TrainConfig) -> None:
        self.backbone, self.config = backbone, config
        self.exits = Exits(backbone, depths)
        self.exits.to(torch.float32)
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
            torch.manual_seed(config.seed)
            self.discriminators = self.new_discriminators()

    def new_discriminators(self) -> nn.ModuleDict:
        """Untrained ones, by depth."""
        some = build_discriminators(
            self.backbone.width, self.exits.depths, conditional=self.config.conditional
        )
        return some.to(self.backbone.device)

    def features(self, batch: Batch) -> dict[int, Tensor]:
        """Final-normed exit states [B, A, D] by depth; see `exit_features`."""
        half = self.backbone.dtype != torch.float32
        with torch.autocast(self.backbone.device.type, self.backbone.dtype, enabled=half):
            return exit_features(self.backbone, self.exits, batch)

    def look(self, batch: Batch) -> dict[int, Terms]:
        """Exits and final layer side by side, answer tokens only, by depth."""
        features, keep = self.features(batch), batch.mask
        teacher = batch.teacher[keep]
        teacher_logits = self.backbone.read(teacher)
        labelled = batch.labelled[:, None].expand_as(keep)[keep].float()
        scene = {}
        for depth, states in features.items():
            kept = states[keep]
            scene[depth] = Terms(
                logits=self.backbone.read(kept),
                teacher_logits=teacher_logits,
                features=kept,
                teacher_features=teacher,
                targets=batch.targets[keep],
                labelled=labelled,
                judged=self._judge(depth, kept, batch) if self.config.adversarial else None,
                temperature=self.config.temperature,
            )
        return scene

    def generator_loss(self, scene: Mapping[int, Terms]) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum over terms and depths, and each term by itself, unweighted."""
        report: dict[str, float] = {}
        loss = torch.zeros((), device=self.backbone.device)
        for depth, terms in scene.items():
            for name, term in LOSSES.items():
                weight = getattr(self.config, name)
                if not weight:
                    continue
                everything = torch.ones_like(terms.labelled)
                counted = terms.labelled if name == "cross_entropy" else everything
                value = masked_mean(term(terms), counted)
                report[f"{name}/{depth}"] = value.item()
                loss = loss + weight * value
        return loss, report

    def discriminator_loss(
        self, batch: Batch, scene: Mapping[int, Terms]
    ) -> tuple[Tensor, dict[str, float]]:
        """The sum over depths, and each depth's by itself; no gradient reaches the exits."""
        report: dict[str, float] = {}
        loss = torch.zeros((), device=self.backbone.device)
        for depth, terms in scene.items():
            real = self._judge(depth, terms.teacher_features, batch)
            fake = self._judge(depth, terms.features.detach(), batch)
            value = discriminator_loss(real, fake).mean()
            report[f"discriminator/{depth}"] = value.item()
            loss = loss + value
        return loss, report

    @torch.no_grad()
    def agreeing(self, batch: Batch) -> list[int]:
        """On how many answer tokens each exit's argmax is the final layer's; last, of how many."""
        teacher = self.backbone.read(batch.teacher[batch.mask]).argmax(-1)
        said = [
            self.backbone.read(states[batch.mask]).argmax(-1)
            for states in self.features(batch).values()
        ]
        return [*(int((tokens == teacher).sum()) for tokens in said), len(teacher)]

    def _judge(self, depth: int, features: Tensor, batch: Batch) -> Tensor:
        entries = batch.entries(depth)[batch.mask].float()
        return self.discriminators[str(depth)](features.float(), entries)  # type: ignore[no-any-return]
