"""DeeBERT's off-ramps (Xin et al. 2020): each exit has a classifier of its own, and is left by the
entropy of what that says.

The paper's objective is cross-entropy and its rule the score `entropy`; what is added here is the
exit, a linear layer without attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp.core.models.backbone import Backbone


class OffRamp(nn.Module):
    """A classifier of the state at its depth: one linear layer before the backbone's norm and head.

    The layer and the head together are a classifier of the exit's own; a matrix of D x V alone
    would be most of a small model. The exit attends to nothing, so its entry in the cache stays
    empty, and before training it is the logit lens.
    """

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.own: nn.Linear = nn.Linear(width, width, dtype=dtype)
        nn.init.eye_(self.own.weight)
        nn.init.zeros_(self.own.bias)

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return the estimate [B, T, D] of the final state."""
        return self.own(hidden.to(self.own.weight.dtype))  # type: ignore[no-any-return]


def off_ramp(backbone: Backbone, depth: int, own: Sequence[int]) -> OffRamp:
    """Build the off-ramp at a depth, in float32 as other exits are trained."""
    return OffRamp(backbone.width, torch.float32).to(backbone.device)
