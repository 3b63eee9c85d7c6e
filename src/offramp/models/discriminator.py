"""The feature classifier of adversarial training: is this state an exit's or the final layer's?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from offramp.errors import InputError, did_you_mean
from offramp.models import JUDGED


class Verdict(NamedTuple):
    """A discriminator's opinion of N states.

    logits: [N], high for the final layer's own. hidden: [N, H], what they are read from.
    """

    logits: Tensor
    hidden: Tensor


class Discriminator(nn.Module):
    """A small classifier of final-normed states; its logit is high for the final layer's own.

    Conditional, it also sees the state that entered the exit. Unconditional, it never knows which
    token it judges, and an exit can please it with a plausible state for the wrong token.
    Judging "sequence", it gives one verdict for an answer, from the mean of what its first layer
    sees in the tokens (deep sets, Zaheer et al. 2017); every token has its answer's verdict.
    Spectral norm holds each linear map's Lipschitz constant at 1 (Miyato et al. 2018); its power
    iteration moves in training mode only.
    """

    def __init__(
        self,
        width: int,
        *,
        conditional: bool = True,
        spectral_norm: bool = False,
        judged: str = "token",
        hidden: int = 256,
    ) -> None:
        """Raise `InputError` where `judged` is neither "token" nor "sequence"."""
        if judged not in JUDGED:
            raise InputError(
                f"A discriminator that judges {judged!r} is not known.",
                did_you_mean(str(judged), JUDGED),
            )
        super().__init__()
        self.options: dict[str, Any] = {
            "conditional": conditional,
            "spectral_norm": spectral_norm,
            "judged": judged,
        }
        linear = _spectral_linear if spectral_norm else nn.Linear
        self.feature_norm: nn.LayerNorm = nn.LayerNorm(width)
        self.entry_norm: nn.LayerNorm | None = nn.LayerNorm(width) if conditional else None
        self.net: nn.Sequential = nn.Sequential(
            linear(width * (2 if conditional else 1), hidden),
            nn.LeakyReLU(0.2),
            linear(hidden, hidden),
            nn.LeakyReLU(0.2),
            linear(hidden, 1),
        )

    def forward(self, features: Tensor, entries: Tensor, rows: Tensor | None = None) -> Tensor:
        """The logits [N] of `judge`."""
        return self.judge(features, entries, rows).logits

    def judge(self, features: Tensor, entries: Tensor, rows: Tensor | None = None) -> Verdict:
        """The verdict on final-normed `features` [N, D] from exit inputs `entries` [N, D].

        rows: number of the answer [N] that each token is of; None: each is an answer of its own.
        """
        seen = self.feature_norm(features)
        if self.entry_norm is not None:
            seen = torch.cat([seen, self.entry_norm(entries)], -1)
        inner, bend, outer, _, head = self.net
        hidden = bend(inner(seen))
        if rows is None or self.options["judged"] == "token":
            hidden = bend(outer(hidden))
            return Verdict(head(hidden).squeeze(-1), hidden)
        hidden = bend(outer(_means(hidden, rows)))
        return Verdict(head(hidden).squeeze(-1)[rows], hidden[rows])


def _spectral_linear(width: int, out: int) -> nn.Module:
    return parametrizations.spectral_norm(nn.Linear(width, out))


def _means(values: Tensor, rows: Tensor) -> Tensor:
    """The mean of `values` [N, H] over the tokens of each row; 0 where a row has none."""
    belongs = F.one_hot(rows).T.to(values)  # a product, which is the same each time on a GPU too
    return belongs @ values / belongs.sum(1, keepdim=True).clamp(min=1.0)


def build_discriminators(width: int, depths: Sequence[int], **options: Any) -> nn.ModuleDict:
    """One discriminator for each depth, by depth. options: those of `Discriminator`."""
    return nn.ModuleDict({str(d): Discriminator(width, **options) for d in depths})
