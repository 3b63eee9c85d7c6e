"""The plan of a backbone in PyTorch: what `generate`, the batch engine and the checks decode by."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import torch

from offramp.core.decoding.confidence import HEADS
from offramp.core.decoding.plan import Plan, draft_levels, drafter_at
from offramp.core.decoding.policy import ExitPolicy, check_policy_depths, first_token_may_exit
from offramp.core.engine.heads import ExitHeads
from offramp.core.errors import InputError
from offramp.core.executors.choice import executor_for
from offramp.core.executors.drafter import DraftingExit
from offramp.core.executors.prompt import PromptReader
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet
from offramp.core.models.weights import float_dtype

PLANS = 4
"""Plans that are kept, one for each policy that was asked for last."""


class KeptPlans:
    """The newest `PLANS` plans by their policies; usable from several threads."""

    def __init__(self) -> None:
        self._kept: tuple[tuple[ExitPolicy, Plan], ...] = ()

    def of(self, policy: ExitPolicy, make: Callable[[], Plan]) -> Plan:
        """Return the plan of a policy, made where none is kept."""
        for known, plan in self._kept:
            if known == policy:
                return plan
        plan = make()
        self._kept = ((policy, plan), *self._kept[: PLANS - 1])
        return plan


def plan_of(
    backbone: Backbone,
    exits: ExitSet | Exits | None,
    policy: ExitPolicy,
    *,
    modes: Collection[str] | None = None,
    heads: Callable[..., ExitHeads] | None = None,
    drafts_on: bool = True,
) -> Plan:
    """Choose the exits, heads and drafter by which answers are written.

    modes: of `offramp.core.decoding.policy.MODES` that answers may ask for; None: the policy's own
    alone.
    heads: in place of the heads that the policy's score names. drafts_on: whether the executor can
    let an exit draft on from its own state.

    Raises:
        InputError: thresholds where no exit stands, or what the policy needs is missing.
        UnsupportedBackboneError: a lossless policy, of a backbone whose drafts stay in the cache.
    """
    backbone.seat()
    attached = None if exits is None else ExitSet.of(exits)
    stand = () if attached is None else attached.depths
    check_policy_depths(policy, stand)
    asked = {policy.own_mode} if modes is None else set(modes)
    drafts = "lossless" in asked or ("early_exit" in asked and policy.drafting)
    drafting, levels = None, dict[int, float]()
    if drafts and (attached is not None or policy.drafter is not None):
        if drafts_on and attached is not None:
            drafting = DraftingExit.of(backbone, attached, policy)
        levels = draft_levels(policy, None if drafting is None else drafting.depth, backbone.depth)
    if levels and modes is None:
        backbone.check_lossless()
    early = policy.thresholds if "early_exit" in asked and attached is not None else {}
    depths = tuple(sorted({*early, *levels} - {backbone.depth}))
    in_use = attached if depths else None
    if in_use is not None:
        _check_precision(backbone, in_use)
    made = heads or HEADS.get(policy.score, ExitHeads)
    asking = made(backbone, in_use, policy, depths)
    return Plan(
        backbone.depth,
        depths,
        policy,
        asking,
        executor=partial(
            executor_for,
            backbone,
            attached,
            depths,
            needs_previous_state=asking.needs_previous_state,
            drafter=drafting,
        ),
        reader=partial(PromptReader, backbone, attached, depths),
        drafter=drafter_at(
            levels,
            named=policy.drafter,
            draws_on=drafting is not None,
            vocabulary=backbone.vocabulary,
        ),
        levels=levels if backbone.lossless else {},
        first_may_exit=first_token_may_exit(backbone, policy),
        tested=backbone.tested and backbone.engine is not None,
    )


def _check_precision(backbone: Backbone, exits: ExitSet) -> None:
    """Raise `InputError` where one of model and exits was made double, and the other was not."""
    both = backbone.dtype, float_dtype(exits.modules)
    held = any(True for _ in exits.modules.parameters())
    if held and both[0] != both[1] and torch.float64 in both:
        raise InputError(
            f"The model is in {both[0]}, and its exits are in {both[1]}.",
            f"Move them as well: adapter.exits.modules.to({both[0]}).",
        )
