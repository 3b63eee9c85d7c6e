"""Scores that others exit by, and that no measurement here favours: patience (PABEE), saturation
(MuE) and the discriminator's verdict. As in `offramp.engine.confidence`, larger is safer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from offramp.engine.confidence import Streak
from offramp.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from offramp.engine.exit_check import ExitCheck


class Patience:
    """How long the exits have agreed (PABEE, Zhou et al. 2020).

    With E exits that are on, the score [B] is n / (E - 1), where n counts the exits just before
    this one that choose its token, one after the other. A threshold t is a patience of
    ceil(t * (E - 1)) agreeing pairs in a row, and the threshold for a patience of n is n / (E - 1).
    The first exit has nothing to agree with and scores 0, as does a single one.
    """

    def __init__(self, depths: Sequence[int], weights: Mapping[int, float]) -> None:
        """depths: of the exits that are on. weights: not used."""
        self._streak = Streak(min(depths))
        self._most = max(1, len(depths) - 1)

    def __call__(self, depth: int, logits: Tensor) -> Tensor:
        """The score [B] of logits [B, V] at `depth`; call with one token's exits in order."""
        import torch

        ones = torch.ones(len(logits), device=logits.device)
        return (self._streak.add(depth, logits, ones) - 1.0) / self._most


def saturation(check: ExitCheck) -> Tensor:
    """How little the last layer changed the state (MuE, Tang et al. 2023).

    (1 + cos) / 2 [B], of the angle between the state [B, D] and that one decoder layer earlier.
    """
    from torch import cosine_similarity

    assert check.previous is not None
    cosine = cosine_similarity(check.entry.float(), check.previous.float(), dim=-1)
    return (0.5 + 0.5 * cosine).clamp(0.0, 1.0)


def discriminator(check: ExitCheck) -> Tensor:
    """How sure the trained discriminator [B] is to see the final layer's own features.

    Raises:
        InputError: exits without discriminators.
    """
    judges = None if check.exits is None else check.exits.discriminators
    if judges is None:
        raise InputError(
            "The discriminator score needs the discriminators trained with the exits.",
            "Keep discriminators.safetensors in the adapter's folder, or use another score.",
        )
    verdict: Tensor = judges[str(check.depth)](check.features.float(), check.entry.float())
    return verdict.sigmoid()
