"""Losses of exit training, each per token; a batch's loss is the mean over its answer tokens.

A term takes a `LossInputs` of N answer tokens and returns N values. Pads, prompt and image tokens
are gone before any of them is called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from offramp.core.errors import InputError


@dataclass(frozen=True)
class LossInputs:
    """N answer tokens with the states and logits of an exit and of the final layer.

    logits, teacher_logits: [N, V], the teacher's up to a constant for each token. features,
    teacher_features: final-normed states [N, D]. targets: [N] token ids. labelled: [N], 1 where a
    person wrote the token. judge: returns the discriminator's logits [N] for states [N, D] of these
    tokens; None without a discriminator. teacher_log: [N, V], log-softmax of the teacher's logits
    at the temperature; None: not known.
    """

    logits: Tensor
    teacher_logits: Tensor
    features: Tensor
    teacher_features: Tensor
    targets: Tensor
    labelled: Tensor
    judge: Callable[[Tensor], Tensor] | None = None
    temperature: float = 1.0
    teacher_log: Tensor | None = None


def log_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the log-softmax [..., V] of logits at a temperature, in float32."""
    logits = logits.float()
    return (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Return KL(teacher || student) [N] of log probabilities [N, V]. Bound: >= 0."""
    return F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)


def distillation(t: LossInputs) -> Tensor:
    """Return T^2 KL(teacher || exit) [N] at temperature T (Hinton et al. 2015). Bound: >= 0."""
    known, at = t.teacher_log, t.temperature
    teacher = log_probabilities(t.teacher_logits, at) if known is None else known
    return kl(teacher, log_probabilities(t.logits, at)) * at**2


def cross_entropy(t: LossInputs) -> Tensor:
    """Return -log p(target) [N], 0 where the target is not labelled. Bound: >= 0."""
    if not t.labelled.any():  # nor is the gradient anything else
        return t.features[:, 0].float() * 0.0
    return F.cross_entropy(t.logits.float(), t.targets, reduction="none") * t.labelled


def l2(t: LossInputs) -> Tensor:
    """Return |exit - final|^2 / D [N] of the features (FitNets, Romero et al. 2015). Bound: >=
    0."""
    return (t.features.float() - t.teacher_features.float()).square().mean(-1)


def cosine(t: LossInputs) -> Tensor:
    """Return 1 - cos(exit, final) [N] of the features (as in DistilBERT, Sanh et al. 2019). In [0,
    2]."""
    return 1 - F.cosine_similarity(t.features.float(), t.teacher_features.float(), dim=-1)


def adversarial(t: LossInputs) -> Tensor:
    """Return softplus(-D(exit)) [N], an exit's non-saturating loss to its discriminator (Goodfellow
    et al. 2014). Bound: >= 0."""
    assert t.judge is not None
    return F.softplus(-t.judge(t.features))


LOSSES: dict[str, Callable[[LossInputs], Tensor]] = {
    "distillation": distillation,
    "cross_entropy": cross_entropy,
    "l2": l2,
    "cosine": cosine,
    "adversarial": adversarial,
}
"""Terms of the exits' loss by name."""

_BUILT_IN = frozenset(LOSSES)


def register_loss(name: str, loss: Callable[[LossInputs], Tensor]) -> None:
    """Register a loss under a name for `TrainConfig.losses` and `offramp train --losses`.

    loss: returns N values for N answer tokens; a batch's loss is their mean.

    Raises:
        InputError: the name is a built-in loss's.
    """
    if name in _BUILT_IN:
        raise InputError(f"{name!r} is a built-in loss.", "Register yours under another name.")
    LOSSES[name] = loss


def discriminator_loss(final: Tensor, exit: Tensor) -> Tensor:
    """Return softplus(-final) + softplus(exit) [N], for a discriminator's logits [N] of the final
    layer's features and of the exit's (Goodfellow et al. 2014). Bound: >= 0."""
    return F.softplus(-final) + F.softplus(exit)
