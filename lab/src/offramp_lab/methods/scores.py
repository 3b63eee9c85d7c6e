"""Scores that others exit by, and that no measurement here favours: saturation (MuE) and the
discriminator's verdict. As in `offramp.engine.confidence`, larger is safer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offramp.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from offramp.engine.exit_check import ExitCheck


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
