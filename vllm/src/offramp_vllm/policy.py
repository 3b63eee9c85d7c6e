"""When tokens leave early: the adapter's rule, and what a request asks for in its place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from offramp_vllm.refuse import Refused

OURS = "offramp_"
KNOWN = MODE, THRESHOLD = "offramp_mode", "offramp_threshold"
"""Names in a request's `vllm_xargs` (over HTTP) or `SamplingParams.extra_args`."""
MODES = FULL, EARLY, LOSSLESS = "full", "early_exit", "lossless"
CHECKED_AT = 0.5
"""The threshold that exits without any of their own are checked at."""
OFF = math.nan
"""Threshold of an exit where nothing leaves."""


@dataclass(frozen=True)
class Rule:
    """Thresholds of each exit, ascending by depth; NaN: off. A token leaves where its score is at
    least the threshold, and at 0 in any case.

    thresholds: of all tokens but an answer's first. first: of that. score: name of the score.
    drafts: the least product of a round's scores at which the first exit drafts on. given: whether
    the adapter has thresholds; without, tokens leave by a request's alone, as `at` says.
    """

    thresholds: tuple[float, ...]
    first: tuple[float, ...]
    score: str = "max_probability"
    drafts: float = 0.0
    given: bool = True

    @classmethod
    def of(cls, policy: Mapping[str, Any], depths: Sequence[int], *, first: bool = True) -> Rule:
        """The rule of a policy as adapter.json has it. First tokens are at the policy's thresholds
        of first tokens, at those of all where it has none, or off where prompts may not wait.

        first: whether offramp lets first tokens exit on the model; not on Qwen3-VL, whose prompts
        get features between layers."""
        at = {int(d): float(t) for d, t in policy["thresholds"].items()}
        given, at = bool(at), at or dict.fromkeys(depths, 0.0)
        opening = {int(d): float(t) for d, t in policy.get("first", {}).items() if int(d) in at}
        if not policy.get("first"):
            opening = at
        if not first or not policy.get("exit_in_prefill", False):
            opening = {}
        return cls(
            tuple(at.get(d, OFF) for d in depths),
            tuple(opening.get(d, OFF) for d in depths),
            policy.get("score", "max_probability"),
            float(policy.get("drafts", {}).get(str(min(depths)), 0.0)),
            given,
        )

    @property
    def off(self) -> Rule:
        """Every token at full depth."""
        none = (OFF,) * len(self.thresholds)
        return replace(self, thresholds=none, first=none)

    @property
    def is_on(self) -> bool:
        return not all(map(math.isnan, self.thresholds))

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
        return replace(self, thresholds=now, first=first)


@dataclass(frozen=True)
class Asked:
    """What a request is served by. mode: of `MODES`. rule: when its tokens leave."""

    mode: str
    rule: Rule


def asked(rule: Rule, extra: Mapping[str, Any] | None, *, drafts: bool) -> Asked:
    """What a request asks for.

    rule: the adapter's. extra: the request's extra arguments. drafts: whether the server drafts;
    requests that name no mode are then lossless, else early where the adapter has thresholds.

    Raises:
        Refused: a name that there is not, an unknown mode, a threshold that is no number in [0, 1],
            or one beside a mode in which nothing leaves by it; early exit without any.
    """
    extra = extra or {}
    unknown = sorted(name for name in extra if name.startswith(OURS) and name not in KNOWN)
    if unknown:
        raise Refused(f"{unknown[0]} is no setting of a request.", f"Give {' or '.join(KNOWN)}.")
    threshold = extra.get(THRESHOLD)
    own = LOSSLESS if drafts else EARLY if rule.given else FULL
    mode = extra.get(MODE, own if threshold is None else EARLY)
    if mode not in MODES:
        raise Refused(f"{MODE} is {mode!r}.", f"Give one of {', '.join(MODES)}.")
    if mode == LOSSLESS and not drafts:
        raise Refused(
            "The server has no drafts, so no answer can be drafted and verified.",
            "Start it with --speculative-config, or ask for early_exit or full.",
        )
    if mode != EARLY and threshold is not None:
        raise Refused(f"{THRESHOLD} beside {MODE} {mode!r}.", "Give one of the two.")
    if mode != EARLY:
        return Asked(mode, rule.off)
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
