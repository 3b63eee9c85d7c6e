"""When tokens leave early: the adapter's rule, and what a request asks for in its place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from offramp_vllm.refuse import Refused

OURS = "offramp_"
KNOWN = MODE, THRESHOLD, TRUST = "offramp_mode", "offramp_threshold", "offramp_trust"
"""Names in a request's `vllm_xargs` (over HTTP) or `SamplingParams.extra_args`."""
MODES = FULL, EARLY, LOSSLESS = "full", "early_exit", "lossless"
CHECKED_AT = 0.5
"""The threshold that exits without any of their own are checked at."""
OFF, NEVER = math.nan, math.inf
"""Threshold of an exit that is not asked; and one that no score reaches: of tokens that leave only
with drafts that end the answer, and a trust at which the full model verifies them all."""


@dataclass(frozen=True)
class Rule:
    """Thresholds of each exit, ascending by depth; NaN: off. A token leaves where its score is at
    least the threshold, and at 0 in any case.

    thresholds: of all tokens but an answer's first. first: of that. score: name of the score.
    drafts: the least product of a round's scores at which the first exit drafts on. given: whether
    the adapter has thresholds; without, tokens leave by a request's alone, as `at` says.
    trust: None: tokens leave by thresholds. Else the first exit only drafts: drafts that end the
    answer are taken if the product of their scores is at least `trust`, and the full model verifies
    all others. longest: drafts of such a round, at most.
    """

    thresholds: tuple[float, ...]
    first: tuple[float, ...]
    score: str = "max_probability"
    drafts: float = 0.0
    given: bool = True
    trust: float | None = None
    longest: int = 8

    @classmethod
    def of(cls, policy: Mapping[str, Any], depths: Sequence[int], *, first: bool = True) -> Rule:
        """The rule of a policy as adapter.json has it. First tokens are at the policy's thresholds
        of first tokens, at those of all where it has none, or off where prompts may not wait.

        first: whether offramp lets first tokens exit on the model; not on Qwen3-VL, whose prompts
        get features between layers."""
        at = {int(d): float(t) for d, t in policy["thresholds"].items()}
        given, at = bool(at), at or dict.fromkeys(depths, 0.0)
        drafts = policy.get("drafts", {})
        by_first = not drafts or str(min(depths)) in drafts  # no other exit drafts here
        opening = {int(d): float(t) for d, t in policy.get("first", {}).items() if int(d) in at}
        if not policy.get("first"):
            opening = at
        if not first or not policy.get("exit_in_prefill", False):
            opening = {}
        return cls(
            tuple(at.get(d, OFF) for d in depths),
            tuple(opening.get(d, OFF) for d in depths),
            policy.get("score", "max_probability"),
            float(drafts.get(str(min(depths)), 0.0)),
            given,
            policy.get("trust") if by_first else None,
            policy.get("max_draft", cls.longest),
        )

    @property
    def off(self) -> Rule:
        """Every token at full depth."""
        none = (OFF,) * len(self.thresholds)
        return replace(self, thresholds=none, first=none, trust=None)

    @property
    def lossless(self) -> Rule:
        """Drafts that the full model verifies."""
        return replace(self.off, trust=NEVER)

    def taking(self, trust: float) -> Rule:
        """Drafts that are taken by a trust. A prompt that may wait at the first exit waits for its
        first drafts."""
        waits = (NEVER if self.waits else OFF, *self.off.first[1:])
        return replace(self.off, first=waits, drafts=0.0, trust=trust)

    @property
    def is_on(self) -> bool:
        """Whether tokens leave by thresholds."""
        return not all(map(math.isnan, self.thresholds))

    @property
    def is_early(self) -> bool:
        """Whether tokens may be other than the full model's."""
        return self.is_on or self.takes

    @property
    def takes(self) -> bool:
        """Whether drafts may be taken unverified."""
        return self.trust is not None and self.trust != NEVER

    @property
    def early(self) -> Mapping[str, Any]:
        """What a request to be answered early has among its extra arguments."""
        return {MODE: EARLY} if self.given else {THRESHOLD: CHECKED_AT}

    @property
    def waits(self) -> bool:
        """Whether a prompt may stay at its exit until a later token needs it deeper."""
        return not all(map(math.isnan, self.first))

    def at(self, threshold: float) -> Rule:
        """The rule at another threshold for every exit that is on. First tokens keep theirs where
        these are stricter."""
        now = tuple(OFF if math.isnan(t) else threshold for t in self.thresholds)
        first = tuple(OFF if math.isnan(t) else max(t, threshold) for t in self.first)
        return replace(self, thresholds=now, first=first, trust=None)


@dataclass(frozen=True)
class Asked:
    """What a request is served by. mode: of `MODES`. rule: when its tokens leave."""

    mode: str
    rule: Rule


def asked(
    rule: Rule,
    extra: Mapping[str, Any] | None,
    *,
    drafts: bool,
    by_exits: bool = False,
    own: str | None = None,
) -> Asked:
    """What a request asks for.

    rule: the adapter's. extra: the request's extra arguments. drafts: whether the server drafts.
    by_exits: whether it does by the exits. own: the mode of requests that name none; None: lossless
    where the server drafts, else early where the adapter has thresholds.

    Raises:
        Refused: a name that there is not, an unknown mode, a threshold that is no number in [0, 1],
            a trust that is none from 0, one of these beside a mode in which nothing leaves by it,
            or both; early exit without any; trust where exits draft nothing.
    """
    extra = extra or {}
    unknown = sorted(name for name in extra if name.startswith(OURS) and name not in KNOWN)
    if unknown:
        raise Refused(f"{unknown[0]} is no setting of a request.", f"Give {' or '.join(KNOWN)}.")
    threshold, trust = extra.get(THRESHOLD), extra.get(TRUST)
    own = own or (LOSSLESS if drafts else EARLY if rule.given else FULL)
    mode = extra.get(MODE, own if threshold is None and trust is None else EARLY)
    if mode not in MODES:
        raise Refused(f"{MODE} is {mode!r}.", f"Give one of {', '.join(MODES)}.")
    if mode == LOSSLESS and not drafts:
        raise Refused(
            "The server has no drafts, so no answer can be drafted and verified.",
            "Start it with --speculative-config, or ask for early_exit or full.",
        )
    name = THRESHOLD if trust is None else TRUST
    if threshold is not None and trust is not None:
        raise Refused(f"{THRESHOLD} beside {TRUST}.", "Give one of the two.")
    if mode != EARLY and extra.get(name) is not None:
        raise Refused(f"{name} beside {MODE} {mode!r}.", "Give one of the two.")
    if mode != EARLY:
        return Asked(mode, rule.lossless if mode == LOSSLESS else rule.off)
    if trust is not None and (not isinstance(trust, float) or not 0.0 <= trust < NEVER):
        raise Refused(
            f"{TRUST} is {trust!r}.",
            "Give a number from 0.0, with its point: vLLM hands true on as 1.",
        )
    trust = rule.trust if threshold is None and trust is None else trust
    if trust is not None and by_exits:
        return Asked(mode, rule.taking(trust))
    if trust is not None:
        raise Refused(
            "Exits answer early by trust with their own drafts, and the server has none of these.",
            "Start it by offramp serve --engine vllm --mode early_exit, or ask for full.",
        )
    if threshold is None and not rule.given:
        raise Refused("These exits have no thresholds.", f"Give {THRESHOLD}, or another {MODE}.")
    if threshold is None:
        return Asked(mode, rule)
    if not isinstance(threshold, float) or not 0.0 <= threshold <= 1.0:
        raise Refused(
            f"{THRESHOLD} is {threshold!r}.",
            "Give a number from 0.0 to 1.0, with its point: vLLM hands true on as 1.",
        )
    return Asked(mode, rule.at(threshold))
