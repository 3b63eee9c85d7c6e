"""What one model decodes by: decided once, by whoever opens it, and never asked again by a token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from offramp.engine.confidence import check_thresholds
from offramp.engine.decoding.decoder import Decoder
from offramp.engine.decoding.drafting import Drafter
from offramp.engine.decoding.executor import Executor
from offramp.engine.decoding.reader import Heads
from offramp.engine.decoding.rule import NO_EXITS, ExitRule
from offramp.engine.decoding.scheduler import AT_ONCE, Schedule
from offramp.engine.policy import MODES, ExitPolicy
from offramp.errors import InputError, check_known


@dataclass(frozen=True, eq=False)
class Plan:
    """Layers, exits, heads, drafter and policy of one model, put together.

    layers: depth L of the full model. depths: of the exits in use, ascending. policy: of answers
    that ask for nothing else. heads: ask exits and the LM head. executor: makes what runs the
    layers; its arguments are sizes. reader: makes what reads prompts for that executor. drafter:
    makes the drafter of an executor; None: lossless answers run at full depth. levels: by the
    drafter's depth, from which score or probability it drafts on. first_may_exit: whether an
    answer's first token may exit.
    """

    layers: int
    depths: tuple[int, ...]
    policy: ExitPolicy
    heads: Heads
    executor: Callable[..., Executor]
    reader: Callable[..., Any]
    drafter: Callable[[Executor, Heads], Drafter] | None = None
    levels: Mapping[int, float] = field(default_factory=dict)
    first_may_exit: bool = True

    def rule(
        self, mode: str | None = None, thresholds: Mapping[int, float] | None = None
    ) -> ExitRule:
        """How an answer uses the exits: the one place where modes meet the policy.

        mode: of `MODES`; None: the policy's own, or early exit where thresholds are given.
        thresholds: by depth, in place of the policy's.

        Raises:
            InputError: an unknown mode; thresholds where no exit stands or outside [0, 1]; exits
                that are wanted and have no thresholds.
        """
        policy = self.policy
        if mode is None:
            mode = policy.own_mode if thresholds is None else "early_exit"
            if mode == "lossless" and not self.levels:
                mode = "full"
        check_known("Mode", [mode], MODES)
        if mode == "full":
            return NO_EXITS
        if not self.depths:
            raise InputError(
                "A request wants exits, and the engine runs none.",
                "Give the engine an adapter whose policy has thresholds, or use mode='full'.",
            )
        if mode == "lossless":
            if not self.levels:
                return NO_EXITS
            return ExitRule(self.levels, lossless=True, max_drafts=policy.max_draft)
        if thresholds is not None:
            policy = policy.at(check_thresholds(dict(thresholds), self.depths))
        elif not policy.thresholds:
            raise InputError(
                "A request wants to exit early, and these exits have no thresholds.",
                "Find some with `offramp calibrate`, give thresholds, or use mode='lossless'.",
            )
        first = policy.opening if self.first_may_exit else {}
        return ExitRule(policy.thresholds, first, pruning=policy.pruning)

    def decoder(
        self, executor: Executor, schedule: Schedule = AT_ONCE, *, longest: int | None = None
    ) -> Decoder:
        """The decoder of an executor that this plan made. schedule, longest: as of `Decoder`."""
        drafter = None if self.drafter is None else self.drafter(executor, self.heads)
        return Decoder(
            self.layers, executor, self.heads, drafter=drafter, schedule=schedule, longest=longest
        )
