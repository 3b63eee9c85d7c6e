"""A score that others exit by, and that no measurement here favours: saturation (MuE). As in
`offramp.core.decoding.confidence`, larger is safer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from offramp.core.engine.heads import ExitCheck


def saturation(check: ExitCheck) -> Tensor:
    """How little the last layer changed the state (MuE, Tang et al. 2023).

    (1 + cos) / 2 [B], of the angle between the state [B, D] and that one decoder layer earlier.
    """
    from torch import cosine_similarity

    assert check.previous is not None
    cosine = cosine_similarity(check.entry.float(), check.previous.float(), dim=-1)
    return (0.5 + 0.5 * cosine).clamp(0.0, 1.0)
