"""When a token exits: the one place that decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np

from offramp.engine.policy import AHEAD, ExitPolicy, Pruning

OPEN_GUESSES = 5
"""Guesses between two calls of the layers above the exit: of more, one is likely wrong."""


class Verdict(NamedTuple):
    """What an exit says of a sequence's next token. open: whether its gate let it look; score: in
    [0, 1], NaN where none was computed."""

    token: int
    score: float
    open: bool = True


CLOSED = Verdict(-1, float("nan"), False)
"""Of an exit whose gate let it not look."""


@dataclass(frozen=True)
class ExitRule:
    """How one request uses the exits.

    Every token is looked at by the exits in order until one reaches its threshold. So thresholds
    say what is counted; guesses and `most` say speed alone.

    thresholds: by depth, where a token exits or, lossless, is drafted. gates: by depth, what its
    gate must foretell for the exit to look. lossless: whether the full model confirms what exits
    say. guesses: by depth, score from which a token that does not reach
    the threshold goes on all the same, until deeper layers have spoken. most: drafts or guesses
    that may be open at a time; None: any number. ahead: lossless, depth of the exit that drafts on
    from its own state (`offramp.engine.drafter`); None: drafts are what exits say of fed tokens.
    sure: of such an exit, the product of its drafts' probabilities down to which it drafts on.
    pruning: where visual tokens of the prompt stay behind; None: nowhere. first: thresholds, by
    depth, of an answer's first token; None: those of every token.
    """

    thresholds: Mapping[int, float]
    lossless: bool = False
    guesses: Mapping[int, float] | None = None
    most: int | None = None
    ahead: int | None = None
    sure: float = 0.0
    pruning: Pruning | None = None
    gates: Mapping[int, float] = field(default_factory=dict)
    first: Mapping[int, float] | None = None

    @classmethod
    def of(
        cls,
        policy: ExitPolicy,
        guess_above: float | None = None,
        *,
        guessing: bool = True,
        first: Mapping[int, float] | None = None,
    ) -> ExitRule:
        """The rule of a policy in a mode.

        guess_above: the level of guesses where the policy has none of its own; None: no guesses.
        guessing: False where no token may go on before it is settled. first: as of the rule.
        """
        policy = policy.effective
        at, guesses = dict(policy.thresholds), dict(policy.guesses)
        if not guesses and guess_above is not None:
            guesses = dict.fromkeys(at, guess_above)
        if not guessing:
            guesses = {}
        most: int | None = policy.max_draft if policy.lossless else OPEN_GUESSES
        if guess_above is not None and not policy.guesses:
            most = None  # its caller's schedule says when the layers above are asked
        thresholds = {d: _single(t) for d, t in at.items()}
        return cls(
            thresholds, policy.lossless, guesses or None, most,
            pruning=policy.pruning, gates={d: _single(g) for d, g in policy.gates.items()},
            first=first,
        )  # fmt: skip

    @classmethod
    def drafting(cls, policy: ExitPolicy, depth: int) -> ExitRule:
        """The rule of answers whose drafts the exit at `depth` writes from its own state."""
        sure = policy.drafts.get(depth, AHEAD)
        return cls({}, lossless=True, most=policy.max_draft, ahead=depth, sure=sure)

    @cached_property
    def opening(self) -> ExitRule:
        """The rule of an answer's first token."""
        first = self.thresholds if self.first is None else self.first
        at = {} if self.lossless else {d: _single(t) for d, t in first.items()}
        return replace(self, thresholds=at, guesses=None)

    @property
    def uses_exits(self) -> bool:
        return bool(self.thresholds) or self.ahead is not None

    @cached_property
    def exiting(self) -> bool:
        """Whether tokens may be other than the full model's."""
        return bool(self.thresholds) and not self.lossless

    def exits(self, depth: int, verdict: Verdict) -> bool:
        """Whether the token exits, or is drafted, at `depth` with what the exit there says."""
        return verdict.open and bool(self.reaches(depth, verdict.score))

    def reaches(self, depth: int, score: Any) -> Any:
        """Whether a score, or each of an array of them, is enough at `depth`. NaN is where every
        token exits."""
        threshold = self.thresholds.get(depth)
        if threshold is None:
            return False
        return threshold == 0.0 or score >= threshold

    def guesses_at(self, depth: int, verdict: Verdict) -> bool:
        """Whether a token that does not exit goes on from what the exit says."""
        if self.guesses is None or not verdict.open:
            return False
        level = self.guesses.get(depth)
        return level is not None and verdict.score >= level

    def shown(self, depth: int, verdict: Verdict) -> float:
        """The score to report: none where a gate was shut, or every token exits."""
        if not verdict.open or self.thresholds.get(depth, 0.0) == 0.0:
            return float("nan")
        return verdict.score


NO_EXITS = ExitRule({})
"""Every token is the full model's."""


@cache
def _single(threshold: float) -> float:
    """A threshold in the scores' precision, in which it is compared."""
    return float(np.float32(threshold))
