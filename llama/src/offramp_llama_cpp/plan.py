"""The plan of a chain of llama.cpp segments, with PyTorch before it or without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from offramp.core.decoding.plan import Plan, draft_levels, drafter_at
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.decoding.reader import Heads
from offramp_llama_cpp.chain import SegmentChain
from offramp_llama_cpp.drafter import ChainDrafter
from offramp_llama_cpp.executor import ChainExecutor
from offramp_llama_cpp.native.drafts import FeedLoop
from offramp_llama_cpp.native.tap import States


def chain_plan(
    layers: int,
    policy: ExitPolicy,
    heads: Callable[[tuple[int, ...]], Heads],
    chain: SegmentChain,
    stand: Sequence[int],
    embed: Callable[[int, int], States],
    *,
    drafter: ChainDrafter | None,
    first_may_exit: bool,
    every_mode: bool = False,
    loop: Callable[[], FeedLoop | None] = lambda: None,
) -> Plan:
    """Decide how a chain writes answers.

    layers: depth L of the full model. heads: made for the depths of the exits in use. stand: depths
    of the exits that the chain has. embed: what a token enters the chain as, [1, D], by its id and
    position. drafter: of the exit that drafts on; None: none does. every_mode: whether answers may
    ask for other modes than the policy's own. loop: makes what feeds the layers below the chain's
    first exit with what that says; it looks at the likeliest token's probability.
    """
    drafts = every_mode or policy.drafting
    own = drafter if drafts and policy.drafter is None else None
    levels = draft_levels(policy, None if own is None else own.depth, layers) if drafts else {}
    early = policy.thresholds if every_mode or not drafts else {}
    depths = tuple(sorted({*early, *(levels if own is None else {})} - {layers}))
    # Alone and early, a few products may be computed otherwise together than one by one.
    exact = chain.slots > 1 or drafts or not depths

    feeds = None
    if not drafts and chain.slots == 1 and depths[:1] == tuple(stand[:1]):
        feeds = loop() if policy.score == "max_probability" else None

    def executor(*, count: Callable[[int, int], None] | None = None, **_: Any) -> ChainExecutor:
        return ChainExecutor(
            chain, stand, embed, depths, exact=exact, drafter=own, loop=feeds, count=count
        )

    made = drafter_at(
        levels,
        named=policy.drafter,
        draws_on=own is not None,
        vocabulary=chain.segments[-1].vocabulary,
    )
    return Plan(
        layers,
        depths,
        policy,
        heads(depths),
        executor,
        lambda **_: None,
        made,
        levels,
        first_may_exit,
    )
