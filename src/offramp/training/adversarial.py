"""The two players of FREE training, and what each of them loses on a batch.

The generator is the exits: their features should pass for the final layer's, and read as it does.
The discriminators tell the two apart. Nothing here updates a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits
from offramp.core.plugins import check_registered
from offramp.features.shortlist import places_of
from offramp.features.teacher_forcing import Batch, exit_features
from offramp.training.config import TrainConfig
from offramp.training.discriminator import build_discriminators
from offramp.training.losses import LOSSES, LossInputs, discriminator_loss, log_probabilities

KEPT_BYTES = 1 << 30
"""Of the teacher's log probabilities; those of further batches are computed each time."""


class AdversarialObjective:
    """The loss of exits against discriminators on a backbone. Both are trained in float32, whatever
    the backbone's precision."""

    def __init__(self, backbone: Backbone, depths: Sequence[int], config: TrainConfig) -> None:
        for name in config.losses:
            check_registered("Loss", "losses", name, lambda: LOSSES)
        self.backbone: Backbone = backbone
        self.config: TrainConfig = config
        self.exits: Exits = Exits(backbone, depths, kind=config.exit_kind)
        self.exits.to(torch.float32)
        self.discriminators: nn.ModuleDict = self._new_discriminators()
        self._head: nn.Module | None = None
        self._places: Tensor | None = None
        self._teacher: MutableMapping[Batch, Tensor] = WeakKeyDictionary()
        """Log probabilities [N, S] of answer tokens, as long as their batch is in memory."""
        self._said: MutableMapping[Batch, Tensor] = WeakKeyDictionary()
        """What the final layer says [N], over the whole vocabulary."""

    def narrow(self, ids: Tensor) -> None:
        """Limit logits to the tokens `ids` [S] of a shortlist from now on.

        Both sides' probabilities are then over these tokens, and labels outside them count for
        nothing.
        """
        self._head = self.backbone.head_rows(ids)
        self._places = places_of(ids, self.backbone.vocabulary)
        self._teacher.clear()

    def _new_discriminators(self) -> nn.ModuleDict:
        """Untrained discriminators, by depth."""
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
            torch.manual_seed(self.config.seed)
            discriminators = build_discriminators(self.backbone.width, self.exits.depths)
        return discriminators.to(self.backbone.device)

    def features(self, batch: Batch) -> dict[int, Tensor]:
        """Return final-normed exit states [B, A, D] by depth; see `exit_features`."""
        half = self.backbone.dtype != torch.float32
        with torch.autocast(self.backbone.device.type, self.backbone.dtype, enabled=half):
            return exit_features(self.backbone, self.exits, batch)

    def logits(self, features: Tensor) -> Tensor:
        """Return logits [..., S] of final-normed states [..., D]: of the shortlist, or of all
        tokens."""
        return self.backbone.logits(features, self._head)

    def loss_inputs(self, batch: Batch) -> dict[int, LossInputs]:
        """Return the states and logits of exits and final layer at answer tokens, by depth."""
        features, keep = self.features(batch), batch.mask
        teacher = batch.teacher[keep]
        teacher_log, temperature = self._teacher_log(batch, teacher), self.config.temperature
        targets = batch.targets[keep]
        labelled = batch.labelled[:, None].expand_as(keep)[keep].float()
        if self._places is not None:
            places = self._places[targets]
            targets, labelled = places.clamp(min=0), labelled * (places >= 0)
        inputs = {}
        for depth, states in features.items():
            answered = states[keep]
            inputs[depth] = LossInputs(
                logits=self.logits(answered),
                teacher_logits=teacher_log if temperature == 1.0 else teacher_log * temperature,
                teacher_log=teacher_log,
                features=answered,
                teacher_features=teacher,
                targets=targets,
                labelled=labelled,
                judge=self._judge(depth, batch) if self.config.has_discriminator else None,
                temperature=temperature,
            )
        return inputs

    @torch.no_grad()
    def _teacher_log(self, batch: Batch, teacher: Tensor) -> Tensor:
        """The final layer's log probabilities [N, S] at the temperature: those that are kept, or
        of its states [N, D]."""
        found = self._teacher.get(batch)
        if found is None:
            found = log_probabilities(self.logits(teacher), self.config.temperature)
            if sum(kept.nbytes for kept in self._teacher.values()) + found.nbytes <= KEPT_BYTES:
                self._teacher[batch] = found
        return found

    def generator_loss(self, inputs: Mapping[int, LossInputs]) -> tuple[Tensor, dict[str, float]]:
        """Return the weighted sum over terms and depths, and each term by itself, unweighted.

        Cross-entropy too is a mean over all tokens, with 0 for unlabelled ones, so that a labelled
        token weighs the same however few there are.
        """
        report: dict[str, float] = {}
        loss = torch.zeros((), device=self.backbone.device)
        for depth, terms in inputs.items():
            for name, weight in self.config.weights.items():
                value = LOSSES[name](terms).mean()
                report[f"{name}/{depth}"] = value.item()
                loss = loss + weight * value
        return loss, report

    def discriminator_loss(
        self, inputs: Mapping[int, LossInputs]
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the sum over depths, and each depth's loss; no gradient reaches the exits."""
        report: dict[str, float] = {}
        loss = torch.zeros((), device=self.backbone.device)
        for depth, terms in inputs.items():
            assert terms.judge is not None
            final, exit = terms.judge(terms.teacher_features), terms.judge(terms.features.detach())
            value = discriminator_loss(final, exit).mean()
            report[f"discriminator/{depth}"] = value.item()
            loss = loss + value
        return loss, report

    @torch.no_grad()
    def agreeing(self, batch: Batch) -> list[int]:
        """Return, for each exit, the number of answer tokens with the final layer's argmax; last,
        the number of all answer tokens.

        The final layer's is over the whole vocabulary, also where the exits have a shortlist.
        """
        teacher = self._said.get(batch)
        if teacher is None:
            teacher = self.backbone.logits(batch.teacher[batch.mask]).argmax(-1)
            self._said[batch] = teacher
        if self._places is not None:
            teacher = self._places[teacher]
        said = [
            self.logits(states[batch.mask]).argmax(-1) for states in self.features(batch).values()
        ]
        return [*(int((tokens == teacher).sum()) for tokens in said), len(teacher)]

    def _judge(self, depth: int, batch: Batch) -> Callable[[Tensor], Tensor]:
        """What the discriminator at `depth` makes of states [N, D] at the batch's answer tokens."""
        entries = self.backbone.here(batch.entries(depth))[batch.mask].float()
        discriminator: Any = self.discriminators[str(depth)]
        return lambda features: discriminator(features.float(), entries)
