"""The plan of a backbone in PyTorch: what `generate`, the batch engine and the checks decode by."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial

from offramp.engine.confidence import HEADS, check_thresholds
from offramp.engine.decoding.drafting import Drafter, ExitDrafts, PlainDrafts
from offramp.engine.decoding.executor import Executor
from offramp.engine.decoding.exit_reader import ExitHeads
from offramp.engine.decoding.plan import Plan
from offramp.engine.decoding.prompt import PromptReader
from offramp.engine.decoding.reader import Heads
from offramp.engine.drafter import DraftingExit
from offramp.engine.executors.choice import executor_for
from offramp.engine.policy import AHEAD, KV_POLICIES, ExitPolicy, first_token_may_exit
from offramp.models.backbone import Backbone
from offramp.models.exits import Exits, ExitSet


def plan_of(
    backbone: Backbone,
    exits: ExitSet | Exits | None,
    policy: ExitPolicy,
    *,
    modes: Collection[str] | None = None,
    heads: Callable[..., ExitHeads] | None = None,
) -> Plan:
    """Decide by which exits, heads and drafter answers are written.

    modes: that answers may ask for, of `offramp.engine.policy.MODES`; None: the policy's own alone.
    heads: made in place of those that the policy's score names.

    Raises:
        InputError: thresholds where no exit stands, or what the policy needs is missing.
        UnsupportedBackboneError: a lossless policy, of a backbone whose drafts stay in the cache.
    """
    attached = None if exits is None else ExitSet.of(exits)
    stand = () if attached is None else attached.depths
    for by_depth in (policy.thresholds, policy.first, policy.drafts):
        check_thresholds(dict(by_depth), stand)
    asked = {policy.own_mode} if modes is None else set(modes)
    drafting, levels = None, dict[int, float]()
    if "lossless" in asked and attached is not None:
        drafting = DraftingExit.of(backbone, attached, policy)
        levels = _levels(policy, drafting)
    if levels and modes is None:
        backbone.check_lossless()
    early = policy.thresholds if "early_exit" in asked and attached is not None else {}
    depths = tuple(sorted({*early, *levels}))
    in_use = attached if depths else None
    made = heads or HEADS.get(policy.score, ExitHeads)
    asking = made(backbone, in_use, policy, depths)
    plan = Plan(
        backbone.depth,
        depths,
        policy,
        asking,
        executor=partial(
            executor_for, backbone, attached, depths,
            needs_previous_state=asking.needs_previous_state, drafter=drafting,
        ),
        reader=partial(PromptReader, backbone, attached, depths),
        drafter=drafter_at(levels, draws_on=drafting is not None),
        levels=levels if backbone.lossless else {},
        first_may_exit=first_token_may_exit(backbone, policy),
    )  # fmt: skip
    another = KV_POLICIES[policy.kv]
    return plan if another is None else another(plan, backbone, attached)


def drafter_at(
    levels: Mapping[int, float], *, draws_on: bool
) -> Callable[[Executor, Heads], Drafter] | None:
    """What makes the drafter of the exit that `levels` names; None where they name none.

    draws_on: whether that exit drafts on from its own state.
    """
    for depth in levels:
        if draws_on:
            return lambda executor, heads: ExitDrafts(executor, depth)
        return lambda executor, heads: PlainDrafts(executor, heads, depth)
    return None


def _levels(policy: ExitPolicy, drafting: DraftingExit | None) -> dict[int, float]:
    """By the depth of the exit that drafts, from where it drafts on; none where none does."""
    if drafting is not None:
        return {drafting.depth: policy.drafts.get(drafting.depth, AHEAD)}
    at = policy.drafts or policy.thresholds
    return {min(at): at[min(at)]} if at else {}
