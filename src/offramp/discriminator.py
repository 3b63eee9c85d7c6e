"""The feature classifier of the adversarial game: is this state an exit's or the final layer's?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Discriminator(nn.Module):
    """A small classifier of final-normed states; its logit is high for the final layer's own.

    Conditional, it also sees the state that entered the exit. Unconditional, it never knows which
    token it judges, and an exit can please it with a plausible state for the wrong token.
    """

    def __init__(self, width: int, *, conditional: bool = True, hidden: int = 256) -> None:
        super().__init__()
        self.conditional = conditional
        self.feature_norm = nn.LayerNorm(width)
        self.entry_norm = nn.LayerNorm(width) if conditional else None
        self.net = nn.Sequential(
            nn.Linear(width * (2 if conditional else 1), hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden, hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden, 1),
        )

    def forward(self, features: Tensor, entries: Tensor) -> Tensor:
        """Logits [N] of final-normed `features` [N, D] from exit inputs `entries` [N, D]."""
        seen = self.feature_norm(features)
        if self.entry_norm is not None:
            seen = torch.cat([seen, self.entry_norm(entries)], -1)
        return self.net(seen).squeeze(-1)  # type: ignore[no-any-return]


def build_discriminators(width: int, depths: Sequence[int], *, conditional: bool) -> nn.ModuleDict:
    """One discriminator for each depth, by depth."""
    return nn.ModuleDict({str(d): Discriminator(width, conditional=conditional) for d in depths})
