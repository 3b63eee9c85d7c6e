"""Losses of exit training: each per token, each with one masked mean.

A term takes a `Terms` of N answer tokens and returns N values. Pads, prompt and image tokens are
gone before any of them is called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Terms:
    """N answer tokens as an exit and the final layer see them.

    logits, teacher_logits: [N, V]. features, teacher_features: final-normed states [N, D].
    targets: [N] token ids. labelled: [N], 1 where a person wrote the token. judged: the
    discriminator's logits [N] of the exit's features, or None when there is no game.
    """

    logits: Tensor
    teacher_logits: Tensor
    features: Tensor
    teacher_features: Tensor
    targets: Tensor
    labelled: Tensor
    judged: Tensor | None
    temperature: float


def distillation(t: Terms) -> Tensor:
    """T^2 KL(teacher || exit) at temperature T (Hinton et al. 2015). Bound: >= 0."""
    teacher = (t.teacher_logits.float() / t.temperature).log_softmax(-1)
    student = (t.logits.float() / t.temperature).log_softmax(-1)
    return F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1) * t.temperature**2


def cross_entropy(t: Terms) -> Tensor:
    """-log p(target), 0 where nobody wrote the target. Bound: >= 0."""
    return F.cross_entropy(t.logits.float(), t.targets, reduction="none") * t.labelled


def adversarial(t: Terms) -> Tensor:
    """The generator's non-saturating loss, softplus(-D(exit)) (Goodfellow et al. 2014)."""
    if t.judged is None:
        return torch.zeros_like(t.labelled)
    return F.softplus(-t.judged.float())


LOSSES: dict[str, Callable[[Terms], Tensor]] = {
    "distillation": distillation,
    "cross_entropy": cross_entropy,
    "adversarial": adversarial,
}


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """softplus(-D(final)) + softplus(D(exit)) for logits [N] each; per token [N]."""
    return F.softplus(-real.float()) + F.softplus(fake.float())


def masked_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean of `values` [N] where `weights` [N] is 1; 0 where it never is."""
    return (values * weights).sum() / weights.sum().clamp(min=1.0)
