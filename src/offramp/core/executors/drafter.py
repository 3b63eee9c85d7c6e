"""An exit that drafts on from its own state: what its layer is given, and what it says.

A round starts from what the exit made of the last token that the full model verified, so no layer
of the backbone runs before the verifying call. Drafts change speed alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from offramp.core.decoding.policy import ExitPolicy, shortlist_of_policy
from offramp.core.executors.bare import head_code, shortlist_head
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import DraftInput, ExitSet
from offramp.core.models.opened import HeadCode


@dataclass(frozen=True, eq=False)
class DraftingExit:
    """One exit of kind "drafting".

    depth: of the exit. input: makes the input of its layer. head: LM head of the tokens that it can
    say; None: the model's own, or `code`. shortlist: ids [S] of these tokens; None: all.
    """

    backbone: Backbone
    depth: int
    input: DraftInput
    head: nn.Module | None
    shortlist: Tensor | None
    code: HeadCode | None = None

    @classmethod
    def of(cls, backbone: Backbone, exits: ExitSet, policy: ExitPolicy) -> DraftingExit | None:
        """Return the deepest exit that can draft on, of those that `policy.drafts` names or of all;
        None where none can.

        The deepest reads the most, and drafting costs the same at any depth.
        """
        if policy.drafter is not None:
            return None
        named = tuple(policy.drafts) or exits.depths
        for depth in sorted(set(named) & set(exits.depths), reverse=True):
            made = exits.modules.draft_input(depth)
            if made is not None:
                shortlist = shortlist_of_policy(policy, exits)
                head = None if shortlist is None else shortlist_head(backbone, exits)
                return cls(backbone, depth, made, head, shortlist, head_code(backbone))
        return None

    def inputs(self, ids: Tensor, states: Tensor) -> Tensor:
        """Return inputs of the exit's layer [n, D], for ids [n] after the exit's states [n, D]."""
        embedded = self.backbone.stack.get_input_embeddings()(ids)
        device = self.input.state.weight.device
        made: Tensor = self.input(embedded.to(device), states.to(device))
        return made.to(self.backbone.dtype)

    def tokens(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the exit's ids [n] and their probabilities [n], from its states [n, D]."""
        backbone = self.backbone
        normed = backbone.final_norm(backbone.here(states))
        logits = backbone.logits(normed, self.head, code=self.code)
        largest, places = logits.float().max(-1)
        shares = (largest - logits.float().logsumexp(-1)).exp()
        return (places if self.shortlist is None else self.shortlist[places]), shares
