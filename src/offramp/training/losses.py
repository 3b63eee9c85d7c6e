"""Losses of exit training, each per token; a batch's loss is the mean over its answer tokens.

A term takes a `LossInputs` of N answer tokens and returns N values. Pads, prompt and image tokens
are gone before any of them is called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from offramp.errors import InputError
from offramp.models.discriminator import Verdict


@dataclass(frozen=True)
class LossInputs:
    """N answer tokens as an exit, the final layer and the discriminator between them see them.

    logits, teacher_logits: [N, V]. features, teacher_features: final-normed states [N, D].
    targets: [N] token ids. labelled: [N], 1 where a person wrote the token. judge: the
    discriminator's verdict on states [N, D] of these tokens, or None without one; asked
    only where a term needs it. adversary: a key of `ADVERSARIES`.
    """

    logits: Tensor
    teacher_logits: Tensor
    features: Tensor
    teacher_features: Tensor
    targets: Tensor
    labelled: Tensor
    judge: Callable[[Tensor], Verdict] | None = None
    adversary: str = "logistic"
    temperature: float = 1.0

    @cached_property
    def verdict(self) -> Verdict:
        """Return the verdict on the exit's features."""
        assert self.judge is not None
        return self.judge(self.features)

    @cached_property
    def teacher_verdict(self) -> Verdict:
        """Return the verdict on the final layer's features, where nothing is to learn for an
        exit."""
        assert self.judge is not None
        with torch.no_grad():
            return self.judge(self.teacher_features)


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) [N] of logits [N, V]. Bound: >= 0."""
    teacher, student = teacher.log_softmax(-1), student.log_softmax(-1)
    return F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)


def distillation(t: LossInputs) -> Tensor:
    """T^2 KL(teacher || exit) at temperature T (Hinton et al. 2015). Bound: >= 0."""
    teacher, student = (x.float() / t.temperature for x in (t.teacher_logits, t.logits))
    return kl(teacher, student) * t.temperature**2


def cross_entropy(t: LossInputs) -> Tensor:
    """-log p(target), 0 where the target is not labelled. Bound: >= 0."""
    return F.cross_entropy(t.logits.float(), t.targets, reduction="none") * t.labelled


def l2(t: LossInputs) -> Tensor:
    """|exit - final|^2 / D of the features (FitNets, Romero et al. 2015). Bound: >= 0."""
    return (t.features.float() - t.teacher_features.float()).square().mean(-1)


def cosine(t: LossInputs) -> Tensor:
    """1 - cos(exit, final) of the features (as in DistilBERT, Sanh et al. 2019). In [0, 2]."""
    return 1 - F.cosine_similarity(t.features.float(), t.teacher_features.float(), dim=-1)


def adversarial(t: LossInputs) -> Tensor:
    """Return what an exit loses to its discriminator: the generator's side of `ADVERSARIES`."""
    return ADVERSARIES[t.adversary].generator(t)


def feature_matching(t: LossInputs) -> Tensor:
    """|h(exit) - h(final)|^2 / H of the discriminator's hidden features. Bound: >= 0.

    Salimans et al. 2016 match the means over a batch, since their samples come without partners;
    here both are of the same token, and each is matched to its own.
    """
    return (t.verdict.hidden - t.teacher_verdict.hidden).square().mean(-1)


LOSSES: dict[str, Callable[[LossInputs], Tensor]] = {
    "distillation": distillation,
    "cross_entropy": cross_entropy,
    "l2": l2,
    "cosine": cosine,
    "adversarial": adversarial,
    "feature_matching": feature_matching,
}

"""Terms of the exits' loss by name."""

_BUILT_IN = frozenset(LOSSES)


def register_loss(name: str, loss: Callable[[LossInputs], Tensor]) -> None:
    """Give a loss a name that `TrainConfig.losses` and `offramp train --losses` know.

    loss: from N answer tokens to N values; a batch's loss is their mean.

    Raises:
        InputError: the name is a built-in loss's.
    """
    if name in _BUILT_IN:
        raise InputError(f"{name!r} is a built-in loss.", "Register yours under another name.")
    LOSSES[name] = loss


class Adversary(NamedTuple):
    """The losses of the two players, per token [N].

    generator: of `LossInputs`, whose verdicts it may read. discriminator: of the logits [N] of the
    final layer's features and of the exit's.
    """

    generator: Callable[[LossInputs], Tensor]
    discriminator: Callable[[Tensor, Tensor], Tensor]


ADVERSARIES: dict[str, Adversary] = {
    "logistic": Adversary(
        lambda t: F.softplus(-t.verdict.logits),
        lambda final, exit: F.softplus(-final) + F.softplus(exit),
    ),
    "hinge": Adversary(
        lambda t: -t.verdict.logits,
        lambda final, exit: F.relu(1 - final) + F.relu(1 + exit),
    ),
    "relativistic": Adversary(
        lambda t: F.softplus(t.teacher_verdict.logits - t.verdict.logits),
        lambda final, exit: F.softplus(exit - final),
    ),
}
"""Adversarial losses of both players, by name.

logistic: non-saturating (Goodfellow et al. 2014). Bound: both >= 0.
hinge: Lim and Ye 2017. The discriminator's is >= 0, the generator's has no bound.
relativistic: Jolicoeur-Martineau 2018. Bound: both >= 0. Of its two forms the paired one, since the
    exit's state and the final layer's at the same token are a pair; the form that compares with the
    other side's mean is for samples without partners.
"""


def gradient_penalty(logits: Tensor, features: Tensor) -> Tensor:
    """R1: |d D(x) / d x|^2 / 2 at `features` x [N, D] (Mescheder et al. 2018). Bound: >= 0.

    Per token [N]. Where a verdict is on an answer of n tokens, the mean over them is the same
    quantity in the norm |x|^2 = sum over tokens / n, so that long answers weigh as short ones do.
    """
    (slope,) = torch.autograd.grad(logits.sum(), features, create_graph=True)
    return slope.square().sum(-1) / 2
