"""What one model decodes by: decided once, by whoever opens the model, and not by each token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, cast

from offramp.core.decoding.decoder import Decoder
from offramp.core.decoding.drafting import (
    DRAFTERS,
    CheckedDrafts,
    Drafter,
    DraftingExecutor,
    ExitDrafts,
    PlainDrafts,
)
from offramp.core.decoding.executor import Executor
from offramp.core.decoding.policy import AHEAD, ExitPolicy
from offramp.core.decoding.reader import Heads
from offramp.core.decoding.rule import NO_EXITS, VERIFIED, ExitRule
from offramp.core.decoding.scheduler import AT_ONCE, Schedule


@dataclass(frozen=True, eq=False)
class Plan:
    """Layers, exits, heads, drafter and policy of one model, put together.

    layers: depth L of the full model. depths: of the exits in use, ascending. policy: of answers
    without a policy of their own. heads: ask exits and the LM head. executor: makes the executor,
    from sizes. reader: makes the reader of prompts for that executor. drafter: makes the drafter of
    an executor; None: answers in lossless mode run at full depth. levels: the lowest score or
    probability at which drafting continues, by the drafter's depth. first_may_exit: whether an
    answer's first token may exit. tested: whether tests have shown that this plan decodes exactly;
    else the model itself reads the first answers of each shape again.
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
    tested: bool = True
    _readers: list[Any] = field(default_factory=list, repr=False)
    _executors: dict[Any, list[Executor]] = field(default_factory=dict, repr=False)

    @contextmanager
    def reading(self, **caches: Any) -> Iterator[Any]:
        """Lend a reader of prompts for one answer. Without caches it is kept for the next answer,
        if tests ran the model: others may leave on their modules what it would copy.

        caches: as of `reader`.
        """
        if not self.tested or any(cache is not None for cache in caches.values()):
            yield self.reader(**caches)
        else:
            with _lent(self._readers, self.reader) as reader:
                yield reader

    @contextmanager
    def running(self, **sizes: Any) -> Iterator[Executor]:
        """Lend an executor for one answer; it holds no sequence before or after, and is kept for
        the next answer of the same sizes, as a reader is.

        sizes: as of `executor`.
        """
        kept = self._executors.setdefault(tuple(sizes.items()), []) if self.tested else []
        with _lent(kept, partial(self.executor, **sizes)) as executor:
            try:
                yield executor
            finally:
                executor.close()

    @cached_property
    def own_rule(self) -> ExitRule:
        """The rule of answers that are written by the policy as it stands."""
        return self.rule()

    def rule(
        self,
        mode: str | None = None,
        thresholds: Mapping[int, float] | None = None,
        point: Mapping[int, float] | None = None,
    ) -> ExitRule:
        """Return the rule by which an answer uses the exits. Policies become rules here alone.

        mode, thresholds, point: as of `ExitPolicy.asked`, which says what is refused.
        """
        policy = self.policy.asked(mode, thresholds, self.depths or tuple(self.levels), point)
        trust = VERIFIED if policy.lossless else policy.trust
        if self.levels and trust is not None:  # by trust drafts go on to the answer's end
            levels = self.levels if policy.lossless else dict.fromkeys(self.levels, 0.0)
            return ExitRule(levels, levels if self.first_may_exit else {}, trust, policy.max_draft)
        if policy.lossless or not policy.thresholds:
            return NO_EXITS
        first = policy.opening if self.first_may_exit else {}
        return ExitRule(policy.thresholds, first)

    def decoder(
        self, executor: Executor, schedule: Schedule = AT_ONCE, *, longest: int | None = None
    ) -> Decoder:
        """The decoder of an executor that this plan made. schedule, longest: as of `Decoder`."""
        drafter = None if self.drafter is None else self.drafter(executor, self.heads)
        return Decoder(
            self.layers, executor, self.heads, drafter=drafter, schedule=schedule, longest=longest
        )


@contextmanager
def _lent(idle: list[Any], make: Callable[[], Any]) -> Iterator[Any]:
    """Lend one of those that are idle, or a new one where other threads have them all. After an
    error it does not come back."""
    try:
        one = idle.pop()
    except IndexError:
        one = make()
    yield one
    idle.append(one)


def draft_levels(policy: ExitPolicy, drafting: int | None, layers: int) -> dict[int, float]:
    """Return, by the depth at which drafts count, the lowest score or probability at which drafting
    continues; empty where nothing drafts.

    drafting: depth of the exit that drafts on from its own state; None: the lowest exit drafts by
    its ordinary predictions. layers: depth L of the full model, at which the drafts of a registered
    drafter count.
    """
    if policy.drafter is not None:
        return {layers: policy.drafts[policy.drafter]}
    if drafting is not None:
        return {drafting: policy.drafts.get(drafting, AHEAD)}
    at = policy.drafts or policy.thresholds
    return {min(at): at[min(at)]} if at else {}


def drafter_at(
    levels: Mapping[int, float], *, named: str | None, draws_on: bool, vocabulary: int
) -> Callable[[Executor, Heads], Drafter] | None:
    """Return a function that makes the drafter of an executor; None where nothing drafts.

    levels: as `draft_levels` returns them. named: a registered drafter; None: the exit drafts.
    draws_on: whether that exit drafts on from its own state. vocabulary: tokens V of the full
    model.
    """
    for depth in levels:
        if named is not None:
            make = DRAFTERS[named]
            return lambda executor, _: CheckedDrafts(make(executor, depth), named, vocabulary)
        if draws_on:
            return lambda executor, heads: ExitDrafts(cast(DraftingExecutor, executor), depth)
        return lambda executor, heads: PlainDrafts(executor, heads, depth)
    return None
