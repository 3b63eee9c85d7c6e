"""Exit checks: the confidence of a token at an exit.

No more is computed than a decision needs. A score that reads no logits runs no LM head at an exit
where no row exits; at a threshold of 0 no score is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from offramp.engine.confidence import FEATURE_SCORES, SCORES, max_probability
from offramp.engine.policy import ExitPolicy
from offramp.errors import InputError
from offramp.models.backbone import Backbone
from offramp.models.exits import ExitSet
from offramp.models.opened import HeadCode

Constrain = Callable[[Tensor], Tensor]
"""Takes logits [B, V] to those of what may be said."""


@dataclass(frozen=True, eq=False, slots=True)
class ExitOutput:
    """An exit's output for n tokens.

    entry: the states that entered it [n, D]. state: what it made of them [n, D], before the final
    norm; None where nobody asked. previous: the states one decoder layer before [n, D], where
    they are known. logits: of what it can say [n, S], where it computed them itself; it then needs
    no state.
    """

    entry: Tensor
    state: Tensor | None
    previous: Tensor | None = None
    logits: Tensor | None = None

    def picked(self, index: Tensor | slice) -> ExitOutput:
        """Return the check of the tokens `index` alone."""
        entry, state, previous, logits = (
            None if part is None else _picked(part, index)
            for part in (self.entry, self.state, self.previous, self.logits)
        )
        assert entry is not None
        return ExitOutput(entry, state, previous, logits)

    @staticmethod
    def joined(parts: Sequence[ExitOutput]) -> ExitOutput:
        """Tokens of several calls, one call after the other. A state is 0 where that call was not
        asked and another was; `previous` is known only where every call knew it."""
        if len(parts) == 1:
            return parts[0]
        state = previous = None
        if any(part.state is not None for part in parts):
            state = torch.cat(
                [torch.zeros_like(p.entry) if p.state is None else p.state for p in parts]
            )
        known = [part.previous for part in parts if part.previous is not None]
        if len(known) == len(parts):
            previous = torch.cat(known)
        return ExitOutput(torch.cat([part.entry for part in parts]), state, previous)


Output = ExitOutput | Tensor
"""Of an exit; or of the full model, final-normed states [n, D]."""


def picked(output: Output, index: Tensor | slice) -> Output:
    """Return the output of the tokens `index` alone."""
    return output.picked(index) if isinstance(output, ExitOutput) else _picked(output, index)


def _picked(part: Tensor, index: Tensor | slice) -> Tensor:
    return part[index] if isinstance(index, slice) else part.index_select(0, index.to(part.device))


def joined(parts: Sequence[Output]) -> Output:
    """Outputs of several calls, one after the other; see `ExitOutput.joined`."""
    outputs = [part for part in parts if isinstance(part, ExitOutput)]
    if outputs:
        return ExitOutput.joined(outputs)
    return torch.cat([part for part in parts if isinstance(part, Tensor)])


@dataclass(eq=False)
class ExitCheck:
    """A token of each row at one exit. Score and logits are computed when first asked for.

    scorer: of the policy.
    state: what the exit at `depth` made [B, D] of `entry` [B, D]. previous: the state [B, D] one
    decoder layer before `entry`, where the score reads it. position: of the token in the answer
    [B], from 0. previous_token: the id [B] that the token follows. row: of the prompt's batch [B].
    made: logits [B, S] that the exit computed itself; None: they are the LM head's of its state.
    """

    scorer: ExitScorer
    depth: int
    state: Tensor | None
    entry: Tensor
    previous: Tensor | None = None
    constrain: Constrain | None = None
    position: Tensor | None = None
    previous_token: Tensor | None = None
    row: Tensor | None = None
    made: Tensor | None = None

    @cached_property
    def features(self) -> Tensor:
        """The exit's state after the final norm [B, D]."""
        assert self.state is not None
        return self.scorer.backbone.final_norm(self.state)

    @cached_property
    def own_logits(self) -> Tensor:
        """Logits [B, S] of the tokens that the exit can say: those of the shortlist, or all."""
        if self.made is not None:
            return self.made
        return self.scorer.backbone.logits(self.features, self.scorer.head, code=self.scorer.code)

    @cached_property
    def logits(self) -> Tensor:
        """Logits [B, V] of the whole vocabulary, before the constraints of the row."""
        ids = self.scorer.shortlist
        if ids is None:
            return self.own_logits
        whole = self.own_logits.new_full(
            (len(self.own_logits), self.scorer.backbone.vocabulary), float("-inf")
        )
        return whole.index_copy_(1, ids, self.own_logits)

    @property
    def allowed(self) -> Tensor:
        """Logits [B, S] under the constraints: a score is confidence in what may be said."""
        if self.constrain is None:
            return self.own_logits
        whole, ids = self.constrain(self.logits), self.scorer.shortlist
        return whole if ids is None else whole[:, ids]

    @property
    def exits(self) -> ExitSet | None:
        """Return the exits that are asked; None: there are none."""
        return self.scorer.exits

    @cached_property
    def score(self) -> Tensor:
        """The confidence score [B], in [0, 1]."""
        return self.scorer.score(self)


class ExitScorer:
    """The score of a policy, and the LM head or the shortlist that it reads."""

    def __init__(
        self,
        backbone: Backbone,
        policy: ExitPolicy,
        exits: ExitSet | None = None,
        code: HeadCode | None = None,
    ) -> None:
        """code: called in place of the LM head.

        Raises:
            InputError: the policy needs a shortlist, and there is none.
        """
        self.backbone: Backbone = backbone
        self.exits: ExitSet | None = exits
        self.code: HeadCode | None = code
        self.shortlist: Tensor | None = shortlist_of_policy(policy, exits)
        own = None if exits is None else exits.score
        self.score: Callable[..., Tensor] = _score_of(policy) if own is None else own

    @cached_property
    def head(self) -> nn.Module | None:
        """Return the LM head of the shortlist; None: the model's own."""
        if self.exits is None or self.shortlist is None:
            return None
        with torch.inference_mode(False):  # it is kept, and may be asked for in training
            return self.exits.shortlist_head(self.backbone)


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


def _score_of(policy: ExitPolicy) -> Callable[[ExitCheck], Tensor]:
    """Return the policy's score, looked up by name at each call: it may be registered anew."""
    name = policy.score

    def score(check: ExitCheck) -> Tensor:
        if name in FEATURE_SCORES:
            return FEATURE_SCORES[name](check)
        return SCORES.get(name, max_probability)(check.allowed)  # else heads score by themselves

    return score
