"""The judge: how safe it is to let a token leave at an exit, computing no more than that needs.

A score of features ("saturation", "discriminator") runs no LM head at an exit where nobody leaves;
where everybody leaves whatever the score, no score is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from offramp.engine.confidence import logits_score, saturation
from offramp.engine.policy import ExitPolicy
from offramp.errors import InputError
from offramp.models.backbone import Backbone
from offramp.models.exits import ExitSet
from offramp.models.shortlist import Gate

Constrain = Callable[[Tensor], Tensor]
"""Takes logits [B, V] to those of what may be said."""


@dataclass(eq=False)
class ExitCheck:
    """One exit's look at a token of each row. Score and logits are computed when first asked for.

    state: what the exit at `depth` made [B, D] of `entry` [B, D]. previous: the state [B, D] one
    decoder layer before `entry`, where the score reads it.
    """

    judge: ExitScorer
    depth: int
    state: Tensor
    entry: Tensor
    previous: Tensor | None
    constrain: Constrain | None

    @cached_property
    def features(self) -> Tensor:
        """The exit's state after the final norm [B, D]."""
        return self.judge.backbone.final_norm(self.state)

    @cached_property
    def few(self) -> Tensor:
        """Logits [B, S] of the tokens that the exit can say: those of the shortlist, or all."""
        return self.judge.backbone.logits(self.features, self.judge.head)

    @cached_property
    def logits(self) -> Tensor:
        """[B, V], without constraints: the loop puts them on once, whatever depth they are from."""
        ids = self.judge.shortlist
        if ids is None:
            return self.few
        whole = self.few.new_full((len(self.few), self.judge.backbone.vocabulary), float("-inf"))
        return whole.index_copy_(1, ids, self.few)

    @property
    def allowed(self) -> Tensor:
        """Logits [B, S] under the constraints: a score is confidence in what may be said."""
        if self.constrain is None:
            return self.few
        whole, ids = self.constrain(self.logits), self.judge.shortlist
        return whole if ids is None else whole[:, ids]

    @cached_property
    def score(self) -> Tensor:
        """[B], in [0, 1]."""
        return self.judge.score(self)


class ExitScorer:
    """Scores the exits of one token after the other, each token's in order of depth."""

    def __init__(
        self,
        backbone: Backbone,
        policy: ExitPolicy,
        depths: Sequence[int],
        exits: ExitSet | None = None,
    ) -> None:
        """depths: of the exits that may leave.

        Raises:
            InputError: what the policy needs is missing: discriminators, weights, a shortlist.
        """
        self.backbone = backbone
        self.shortlist = shortlist_of_policy(policy, exits)
        self.head = None
        if exits is not None and self.shortlist is not None:
            self.head = exits.shortlist_head(backbone)
        self.score = _rule(policy, depths, exits.discriminators if exits is not None else None)

    def __call__(
        self,
        depth: int,
        state: Tensor,
        entry: Tensor,
        previous: Tensor | None = None,
        constrain: Constrain | None = None,
    ) -> ExitCheck:
        """A look at exit state [B, D], entered with `entry` [B, D]; see `ExitCheck`."""
        return ExitCheck(self, depth, state, entry, previous, constrain)


def shortlist_of_policy(policy: ExitPolicy, exits: ExitSet | None) -> Tensor | None:
    """Ids [S] that exits can say under `policy`; None: all. Raise `InputError` without them."""
    if not policy.shortlist:
        return None
    if exits is None or exits.shortlist is None:
        raise InputError(
            "The policy asks for a shortlist, and the adapter has none.",
            "Learn one: offramp train --shortlist 2048; or use a policy with shortlist=False.",
        )
    return exits.shortlist


def gates_of_policy(policy: ExitPolicy, exits: ExitSet) -> dict[int, tuple[Gate, float]]:
    """Gate and threshold by depth. Raise `InputError` where the adapter lacks one."""
    missing = sorted(set(policy.gates) - set(exits.gates))
    if missing:
        raise InputError(
            f"The policy has gates at depths {missing}, where the adapter has none.",
            "Learn them: offramp train --gates; or use a policy with gates={}.",
        )
    return {depth: (exits.gates[depth], level) for depth, level in policy.gates.items()}


def _rule(
    policy: ExitPolicy, depths: Sequence[int], discriminators: nn.ModuleDict | None
) -> Callable[[ExitCheck], Tensor]:
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


def _saturation(look: ExitCheck) -> Tensor:
    assert look.previous is not None
    return saturation(look.entry, look.previous)
