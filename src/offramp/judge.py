"""The judge: how safe it is to let a token leave at an exit, computing no more than that needs.

A score of features ("saturation", "discriminator") runs no LM head at an exit where nobody leaves;
where everybody leaves whatever the score, no score is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from offramp.backbone import Backbone
from offramp.errors import InputError
from offramp.policy import Policy
from offramp.scores import logits_score, saturation

Constrain = Callable[[Tensor], Tensor]
"""Takes logits [B, V] to those of what may be said."""


@dataclass(eq=False)
class Look:
    """One exit's look at a token of each row. Score and logits are computed when first asked for.

    state: what the exit at `depth` made [B, D] of `entry` [B, D]. previous: the state [B, D] one
    decoder layer before `entry`, where the score reads it.
    """

    judge: Judge
    depth: int
    state: Tensor
    entry: Tensor
    previous: Tensor | None
    constrain: Constrain | None

    @cached_property
    def features(self) -> Tensor:
        """The exit's state after the final norm [B, D]."""
        return self.judge.backbone.finish(self.state)

    @cached_property
    def logits(self) -> Tensor:
        """[B, V], without constraints: the loop puts them on once, whatever depth they are from."""
        return self.judge.backbone.read(self.features)

    @property
    def allowed(self) -> Tensor:
        """Logits [B, V] under the constraints: a score is confidence in what may be said."""
        return self.logits if self.constrain is None else self.constrain(self.logits)

    @cached_property
    def score(self) -> Tensor:
        """[B], in [0, 1]."""
        return self.judge.score(self)


class Judge:
    """Scores the exits of one token after the other, each token's in order of depth."""

    def __init__(
        self,
        backbone: Backbone,
        policy: Policy,
        depths: Sequence[int],
        discriminators: nn.ModuleDict | None = None,
    ) -> None:
        """depths: of the exits that may leave.

        Raises:
            InputError: discriminators or weights that the policy's score needs are missing.
        """
        self.backbone = backbone
        self.score = _rule(policy, depths, discriminators)

    def __call__(
        self,
        depth: int,
        state: Tensor,
        entry: Tensor,
        previous: Tensor | None = None,
        constrain: Constrain | None = None,
    ) -> Look:
        """A look at exit state [B, D], entered with `entry` [B, D]; see `Look`."""
        return Look(self, depth, state, entry, previous, constrain)


def _rule(
    policy: Policy, depths: Sequence[int], discriminators: nn.ModuleDict | None
) -> Callable[[Look], Tensor]:
    of_logits = logits_score(policy.score, depths, policy.weights)
    if of_logits is not None:
        return lambda look: of_logits(look.depth, look.allowed)
    if policy.score == "saturation":
        return _saturation
    if discriminators is None:
        raise InputError(
            "The discriminator score needs the discriminators trained with the exits.",
            "Keep discriminators.safetensors in the adapter's folder, or use another score.",
        )
    return lambda look: discriminators[str(look.depth)](
        look.features.float(), look.entry.float()
    ).sigmoid()


def _saturation(look: Look) -> Tensor:
    assert look.previous is not None
    return saturation(look.entry, look.previous)
