"""Training of an EAGLE-3 drafter (Li et al. 2025) on the frozen backbone's recorded states.

Its drafts are unrolled as those of exits that draft on are (training-time test); the loss and the
acceptance are theirs too. Images are not among what it sees: llama.cpp shows a drafter none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from offramp.core.models.backbone import Backbone
from offramp.features.input_processor import InputProcessor
from offramp.features.shortlist import places_of, shortlist_of
from offramp.features.teacher_forcing import Batch
from offramp.inputs.example import Example
from offramp.training.config import TrainConfig
from offramp.training.drafting import Acceptance, DraftTraining, Rollout, seen_by_drafts
from offramp.training.feature_dataset import TrainingStates
from offramp_vllm.exports.eagle3 import Eagle3Drafter, check_drafter, read_depths

ONLY = 0
"""The one key under which `DraftTraining` finds the drafter: it stands at no depth."""


def train_eagle3(
    backbone: Backbone | nn.Module,
    processor: Any,
    examples: Sequence[Example],
    config: TrainConfig,
    out: str | Path,
) -> tuple[Eagle3Drafter, Acceptance]:
    """A drafter trained on the backbone's own answers, and how often its drafts were right of those
    answers that were kept for validation.

    config: steps, batches, learning rate, answers' length, and `shortlist`: the tokens it can say;
        None or 0: all. out: where states are kept that do not fit into memory.

    Raises:
        DataError: no examples, too few of them, or an answer longer than the backbone's positions.
        TrainingError: a loss that is not finite.
        UnsupportedBackboneError: no engine could run a drafter beside the backbone.
    """
    backbone = Backbone.of(backbone)
    check_drafter(backbone)
    accelerator = Accelerator(cpu=backbone.device.type == "cpu")
    train, validation = stores = TrainingStates(
        InputProcessor(backbone, processor),
        examples,
        config,
        read_depths(backbone.depth),
        accelerator,
        Path(out),
        nullcontext(),
    ).record()
    words = torch.arange(backbone.vocabulary)
    if config.shortlist:
        words = shortlist_of(train.answers, validation.answers, config.shortlist)[0]
    stage = _Training(Eagle3Drafter(backbone, words), backbone, config, accelerator)
    found = stage.follow(stores)[ONLY]
    for store in stores:
        store.clear()
    return stage.drafter, found


class _Training(DraftTraining):
    depths = (ONLY,)

    def __init__(
        self, drafter: Eagle3Drafter, backbone: Backbone, config: TrainConfig, accelerator: Any
    ) -> None:
        super().__init__(backbone, config, accelerator)
        self.drafter = self.learning = drafter
        self._ids = drafter.words.to(backbone.device)
        self._places = places_of(self._ids, backbone.vocabulary)
        self._embed = backbone.stack.get_input_embeddings()

    def logits(self, states: Tensor) -> Tensor:
        return self.drafter.logits(states).float()

    def truth(self, batch: Batch) -> tuple[Tensor, Tensor]:
        full = self.backbone.logits(batch.teacher)
        return full[..., self._ids].float(), self._places[full.argmax(-1)]

    def rollouts(self, batch: Batch, steps: int) -> Mapping[int, Rollout]:
        """Slots of the whole text make keys from true states; those of the answer draft on, each
        seeing the true keys up to its place and its own drafts' alone."""
        new = batch.targets.shape[1] - 1
        if new < 1:
            return {}
        drafter, prompt = self.drafter, batch.prompt_ids
        given = [
            torch.cat([batch.prompt[d], batch.answer[d][:, :-1]], 1).float() for d in drafter.depths
        ]
        words = torch.cat([prompt[:, 1:], batch.targets[:, :-1]], 1)
        text = torch.cat([prompt >= 0, batch.mask[:, : new - 1]], 1) & (words >= 0)
        with torch.no_grad():
            embedded = self._embed(words.clamp(min=0)).float()
        slots = torch.arange(words.shape[1], device=words.device)
        behind = slots[:, None] - slots
        before = drafter.fuse(given)
        held: list[tuple[Tensor, Tensor]] = []
        seen = ((behind >= 0) & text[:, None] | (behind == 0))[:, None]
        state = drafter(embedded, before, slots, held, seen)[:, -new:]
        rollout = Rollout(before[:, -new:], [state])
        for step in range(1, steps):
            state = torch.cat([state[:, :1], state[:, :-1]], 1)
            there = F.pad(text, (0, step * new), value=True)[:, None]
            seen = (seen_by_drafts(step, new, len(slots), words.device) & there)[:, None]
            state = drafter(embedded[:, -new:], state, slots[-new:], held, seen)
            rollout.drafts.append(state)
        return {ONLY: rollout}
