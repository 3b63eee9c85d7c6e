"""Exit checks: the confidence of a token at an exit, and the decision which rows exit there.

No more is computed than the decision needs. A score of features ("saturation", "discriminator")
runs no LM head at an exit where no row exits; at a threshold of 0 no score is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from offramp.engine.confidence import (
    FEATURE_SCORES,
    check_thresholds,
    check_weights,
    logits_score,
)
from offramp.engine.policy import ExitPolicy
from offramp.errors import InputError
from offramp.models.backbone import Backbone
from offramp.models.exits import ExitSet
from offramp.models.shortlist import Gate

Constrain = Callable[[Tensor], Tensor]
"""Takes logits [B, V] to those of what may be said."""


@dataclass(eq=False)
class ExitCheck:
    """A token of each row at one exit. Score and logits are computed when first asked for.

    state: what the exit at `depth` made [B, D] of `entry` [B, D]. previous: the state [B, D] one
    decoder layer before `entry`, where the score reads it. position: of the token in the answer
    [B], from 0. previous_token: the id [B] that the token follows.
    """

    scorer: ExitScorer
    depth: int
    state: Tensor
    entry: Tensor
    previous: Tensor | None
    constrain: Constrain | None
    position: Tensor | None = None
    previous_token: Tensor | None = None

    @cached_property
    def features(self) -> Tensor:
        """The exit's state after the final norm [B, D]."""
        return self.scorer.backbone.final_norm(self.state)

    @cached_property
    def own_logits(self) -> Tensor:
        """Logits [B, S] of the tokens that the exit can say: those of the shortlist, or all."""
        return self.scorer.backbone.logits(self.features, self.scorer.head)

    @cached_property
    def logits(self) -> Tensor:
        """[B, V], without constraints: the loop puts them on once, whatever depth they are from."""
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
    def verdict(self) -> Tensor:
        """The discriminator's logits [B], high for the final layer's own features."""
        assert self.scorer.discriminators is not None
        judge = self.scorer.discriminators[str(self.depth)]
        return judge(self.features.float(), self.entry.float())  # type: ignore[no-any-return]

    @cached_property
    def score(self) -> Tensor:
        """[B], in [0, 1]."""
        return self.scorer.score(self)


class ExitScorer:
    """Scores exits: one token after the other, and the exits of a token in order of depth."""

    def __init__(
        self,
        backbone: Backbone,
        policy: ExitPolicy,
        depths: Sequence[int],
        exits: ExitSet | None = None,
    ) -> None:
        """depths: where tokens may exit.

        Raises:
            InputError: what the policy needs is missing: discriminators, weights, a shortlist.
        """
        self.backbone = backbone
        self.shortlist = shortlist_of_policy(policy, exits)
        self.head = None
        if exits is not None and self.shortlist is not None:
            self.head = exits.shortlist_head(backbone)
        self.discriminators = None if exits is None else exits.discriminators
        own = None if exits is None else exits.score
        self.score = _score_of(policy, depths, self.discriminators)
        if own is not None:
            self.score = lambda check: own(check.allowed)

    def __call__(
        self,
        depth: int,
        state: Tensor,
        entry: Tensor,
        previous: Tensor | None = None,
        constrain: Constrain | None = None,
        **token: Tensor,
    ) -> ExitCheck:
        """The check of exit state [B, D], entered with `entry` [B, D]; see `ExitCheck`.

        token: its `position` and `previous_token`, where they are known.
        """
        return ExitCheck(self, depth, state, entry, previous, constrain, **token)


class ExitDecider:
    """Decides, token by token, which rows exit at which depth, and keeps what they exited with.

    thresholds: by depth, ascending. watched: layers whose input the score reads. checks: whether
    rows may exit at all, for the current token. logits: of the rows that exited [B, V], None while
    none has. depths, scores: of the current token [B]. guess_above: score from which a single row
    that is not confident goes on from the exit's token all the same; None: it does not. guessed:
    whether it did, with the current token.
    """

    def __init__(self, backbone: Backbone, exits: ExitSet, policy: ExitPolicy) -> None:
        """Raise `InputError` where the policy's thresholds, weights or gates do not fit."""
        self.thresholds = check_thresholds(dict(policy.thresholds), exits.depths)
        check_weights(policy.weights, exits.depths)
        self.scorer = ExitScorer(backbone, policy, tuple(self.thresholds), exits)
        self.checks = True
        self.guess_above: float | None = None
        self.guessed = False
        self.logits: Tensor | None = None
        self.depths: Tensor
        self.scores: Tensor
        watches = policy.score in FEATURE_SCORES
        self.watched = frozenset(d - 1 for d in self.thresholds) if watches else frozenset()
        self._layers = backbone.depth
        self._gates = gates_of_policy(policy, exits)
        self._open: Tensor  # rows [B] that have not exited
        self._constrain: Constrain | None = None
        self._token: dict[str, Tensor] = {}
        self._fresh: tuple[Tensor, Tensor] | None = None  # depths, scores before the first check

    def begin(
        self, unfinished: Tensor, constrain: Constrain | None, *, check: bool, **token: Tensor
    ) -> None:
        """A new token for each of the rows [B]; with `check=False` none exits.

        token: its `position` and `previous_token` [B].
        """
        self.checks, self._constrain, self.logits, self.guessed = check, constrain, None, False
        self._token = token
        self._open = unfinished
        if self._fresh is None or len(self._fresh[0]) != len(unfinished):
            rows, device = len(unfinished), unfinished.device
            self._fresh = (
                torch.full((rows,), self._layers, device=device),
                torch.full((rows,), float("nan"), device=device),
            )
        self.depths, self.scores = self._fresh

    def candidates(self, depth: int, entry: Tensor) -> Tensor | None:
        """Rows [B] that may exit at `depth`, which `entry` [B, D] enters; None where none may."""
        if not self.checks:
            return None
        if depth not in self._gates:
            return self._open
        gate, level = self._gates[depth]
        candidates = self._open & (gate(entry) >= level)
        return candidates if bool(candidates.any()) else None

    def decide(
        self, depth: int, state: Tensor, entry: Tensor, previous: Tensor | None, candidates: Tensor
    ) -> bool:
        """Let confident `candidates` [B] exit at `depth`; True once every unfinished row has."""
        check = self.scorer(depth, state, entry, previous, self._constrain, **self._token)
        threshold = self.thresholds[depth]
        if threshold == 0.0:
            self.scores = self.scores.masked_fill(candidates, float("nan"))
            self._exit(candidates, check)
            self._open = self._open & ~candidates
            return not bool(self._open.any())
        if len(state) == 1:  # the common case, in one transfer and no masks
            self.scores = check.score
            if not bool(check.score >= threshold):  # in the score's precision, as below
                above = self.guess_above
                self.guessed = above is not None and bool(check.score >= above)
                if not self.guessed:
                    return False
            self.logits, self.depths = check.logits, torch.full_like(self.depths, depth)
            return True
        self.scores = torch.where(candidates, check.score.to(self.scores), self.scores)
        confident = candidates & (check.score >= threshold)
        self._open = self._open & ~confident
        some_exit, some_stay = torch.stack([confident, self._open]).any(1).tolist()
        if some_exit:
            self._exit(confident, check)
        return not some_stay

    def _exit(self, rows: Tensor, check: ExitCheck) -> None:
        """Note that `rows` [B] exit with what `check` found."""
        self.depths = self.depths.masked_fill(rows, check.depth)
        self.logits = (
            check.logits
            if self.logits is None
            else torch.where(rows[:, None], check.logits, self.logits)
        )


def decider_of(backbone: Backbone, exits: ExitSet | None, policy: ExitPolicy) -> ExitDecider | None:
    """What decides under `policy`; None where no token exits: the full model.

    Raises:
        InputError: the policy names depths without an exit, or lacks what its score needs.
    """
    depths = () if exits is None else exits.depths
    if not check_thresholds(dict(policy.thresholds), depths):
        return None
    assert exits is not None
    return ExitDecider(backbone, exits, policy)


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


def _score_of(
    policy: ExitPolicy, depths: Sequence[int], discriminators: nn.ModuleDict | None
) -> Callable[[ExitCheck], Tensor]:
    of_logits = logits_score(policy.score, depths, policy.weights)
    if of_logits is not None:
        return lambda check: of_logits(check.depth, check.allowed)
    if policy.score == "discriminator" and discriminators is None:
        raise InputError(
            "The discriminator score needs the discriminators trained with the exits.",
            "Keep discriminators.safetensors in the adapter's folder, or use another score.",
        )
    return FEATURE_SCORES[policy.score]
