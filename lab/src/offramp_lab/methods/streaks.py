"""Scores that follow a token from exit to exit: patience (PABEE) and agreement (BEEM).

A streak is of one token of one sequence: an exit that chooses another token starts it over, and so
does the next token. As in `offramp.core.decoding.confidence`, larger is safer. No measurement here
favours them over the largest probability.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from offramp.core.decoding.policy import ExitPolicy
from offramp.core.decoding.reader import Query
from offramp.core.decoding.scores import max_probability
from offramp.core.engine.heads import ExitCheck, ExitHeads
from offramp.core.errors import InputError
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import ExitSet


class StreakHeads(ExitHeads):
    """Adds up, sequence by sequence, what consecutive exits bring that choose the same token."""

    def __init__(
        self, backbone: Backbone, exits: ExitSet | None, policy: ExitPolicy, depths: Sequence[int]
    ) -> None:
        super().__init__(backbone, exits, policy, depths)
        self._sums: WeakKeyDictionary[Any, tuple[int, int, float]] = WeakKeyDictionary()
        """By sampler: place in the answer, the token that was chosen, and the sum so far."""

    def scores(self, look: ExitCheck, queries: Sequence[Query | None]) -> Sequence[float]:
        logits = look.allowed
        gains, chosen = self.gains(look.depth, logits).tolist(), logits.argmax(-1).tolist()
        sums = [
            self.score(gain if query is None else self._added(look.depth, query, token, gain))
            for query, token, gain in zip(queries, chosen, gains, strict=True)
        ]
        # In the precision in which thresholds are compared.
        rounded: list[float] = torch.tensor(sums, dtype=torch.float32).tolist()
        return rounded

    def _added(self, depth: int, query: Query, token: int, gain: float) -> float:
        place, total = len(query.before), gain
        before = self._sums.get(query.sampler)
        if before is not None and depth != self._depths[0] and before[:2] == (place, token):
            total += before[2]
        self._sums[query.sampler] = place, token, total
        return total

    def gains(self, depth: int, logits: Tensor) -> Tensor:
        """What the exit at `depth` adds [n], of its logits [n, V]."""
        raise NotImplementedError

    def score(self, total: float) -> float:
        """The score of a sum."""
        return total


class Patience(StreakHeads):
    """How long the exits have agreed (PABEE, Zhou et al. 2020).

    With E exits that are on, the score is n / (E - 1), where n counts the exits just before this
    one that choose its token, one after the other. A threshold t is a patience of ceil(t * (E - 1))
    agreeing pairs in a row, and the threshold for a patience of n is n / (E - 1). The first exit
    has nothing to agree with and scores 0, as does a single one.
    """

    def gains(self, depth: int, logits: Tensor) -> Tensor:
        return torch.ones(len(logits))

    def score(self, total: float) -> float:
        return (total - 1) / max(1, len(self._depths) - 1)


class Agreement(StreakHeads):
    """Confidence that agreeing exits gather (BEEM, Bajpai and Hanawal 2025).

    The sum of w_i * p_i over this exit and those just before it that choose its token, one after
    the other, over the sum of w_i over all exits that are on. p_i is the largest probability of
    exit i and w_i its weight, e.g. its accuracy. Only exits that all agree, each of them certain,
    reach 1, and the first exit reaches its own share of the weights.

    Weights by depth are read from "weights" of what was measured of the exits; without any, all
    count alike.
    """

    def __init__(
        self, backbone: Backbone, exits: ExitSet | None, policy: ExitPolicy, depths: Sequence[int]
    ) -> None:
        """Raise `InputError` where a weight is missing or no number from 0, or all are 0."""
        super().__init__(backbone, exits, policy, depths)
        given = {} if exits is None else exits.measured.get("weights", {})
        self._shares = _shares({int(depth): float(w) for depth, w in given.items()}, depths)

    def gains(self, depth: int, logits: Tensor) -> Tensor:
        return self._shares[depth] * max_probability(logits).double()


def _shares(weights: Mapping[int, float], depths: Sequence[int]) -> dict[int, float]:
    """By depth, what its weight is of those of all exits that are on."""
    own = {d: weights.get(d, -1.0) for d in depths} if weights else dict.fromkeys(depths, 1.0)
    if not all(0 <= w < float("inf") for w in own.values()) or (own and not sum(own.values())):
        raise InputError(
            f"The weights {dict(weights)} do not fit exits at depths {[*depths]}.",
            "Give each of them a number from 0, e.g. its accuracy, and one above 0; or none at "
            "all.",
        )
    return {depth: weight / sum(own.values()) for depth, weight in own.items()}
