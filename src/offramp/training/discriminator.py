"""The feature classifier of adversarial training: is this state an exit's or the final layer's?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

HIDDEN = 256
"""Width of its two inner layers."""


class Discriminator(nn.Module):
    """A small classifier of final-normed states; its logit is high for the final layer's own.

    It also sees the state that entered the exit: otherwise an exit could please it with a plausible
    state for the wrong token.
    """

    def __init__(self, width: int, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.feature_norm: nn.LayerNorm = nn.LayerNorm(width)
        self.entry_norm: nn.LayerNorm = nn.LayerNorm(width)
        self.net: nn.Sequential = nn.Sequential(
            nn.Linear(width * 2, hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden, hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden, 1),
        )

    def forward(self, features: Tensor, entries: Tensor) -> Tensor:
        """Return logits [N] for final-normed `features` [N, D] and exit inputs `entries` [N, D]."""
        seen = torch.cat([self.feature_norm(features), self.entry_norm(entries)], -1)
        logits: Tensor = self.net(seen).squeeze(-1)
        return logits


def build_discriminators(width: int, depths: Sequence[int]) -> nn.ModuleDict:
    """Return one discriminator for each depth, by depth."""
    return nn.ModuleDict({str(d): Discriminator(width) for d in depths})
