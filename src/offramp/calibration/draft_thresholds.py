"""From which score exits should draft for lossless decoding.

Every choice gives the same output, so time alone decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from offramp.adapter.adapter import Adapter
from offramp.adapter.runtime import Runtime
from offramp.core.decoding.policy import FULL, ExitPolicy, Thresholds
from offramp.core.errors import DataError
from offramp.evaluation.timing import (
    GenerateFn,
    exit_generate_fn,
    generate_fn,
    speedup,
    time_interleaved,
)

THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 0.95)
PRODUCTS = (0.0, 0.05, 0.1, 0.2, 0.3)
"""Of a round's drafts, by an exit that drafts on."""
LONGEST = (2, 3, 5, 7, 11, 15)
"""Drafts in a round, at most: 7 and 15 with the newest token are the 8 and 16 rows that one and two
passes over the weights take. An answer's first drafts share a call with its prompt."""


@dataclass(frozen=True)
class Drafting:
    """Thresholds for drafting, and their measured speed against the full model.

    longest: drafts in a round, at most.
    """

    thresholds: Thresholds
    speedup: float
    longest: int = ExitPolicy.max_draft


def draft_policies(adapter: Adapter, thresholds: Sequence[float] | None = None) -> list[ExitPolicy]:
    """Return lossless policies that draft by each exit, at every threshold.

    All else in the adapter's policy (score, shortlist, longest draft) is kept. Among exits that
    draft on, the deepest drafts. thresholds: None: `THRESHOLDS`, or `PRODUCTS` for exits that draft
    on.
    """
    depths, ahead = adapter.exits.depths, adapter.exits.draft_on
    if thresholds is None:
        thresholds = PRODUCTS if ahead else THRESHOLDS
    places = depths[-1:] if ahead else depths
    sweep = [Thresholds({depth: t}) for depth in places for t in thresholds]
    return [replace(adapter.policy, lossless=True, drafts=d) for d in sweep]


def draft_speeds(
    adapter: Adapter,
    inputs: Sequence[Mapping[str, Any]],
    *,
    thresholds: Sequence[float] | None = None,
    rounds: int = 3,
    progress: Any = iter,
    runtime: Runtime | None = None,
    **options: Any,
) -> list[Drafting]:
    """Time lossless decoding by each of `draft_policies`, interleaved, and by the fastest of them
    with every length in `LONGEST`. Return the fastest first.

    inputs: processor output, batch 1 each, like future prompts. runtime: answers in the adapter's
    place; None: PyTorch. options: of generation.

    Raises:
        DataError: no inputs.
    """
    sweep = [(Thresholds(p.drafts), p) for p in draft_policies(adapter, thresholds)]
    early = _answering(adapter, runtime, options)
    found = _timed(early, sweep, inputs, rounds, progress)
    best = replace(sweep[0][1], drafts=found[0].thresholds)
    lengths = [n for n in LONGEST if n != best.max_draft]
    sweep = [(found[0].thresholds, replace(best, max_draft=most)) for most in lengths]
    found += _timed(early, sweep, inputs, rounds, progress)
    return sorted(found, key=lambda one: -one.speedup)


def with_drafts(adapter: Adapter, drafting: Sequence[Drafting]) -> Adapter:
    """Return the adapter with the fastest drafts; unchanged where none beats the full model.

    The guarantee of its early exits stays, because drafts do not change them.
    """
    best = drafting[0]
    if best.speedup <= 1.0:
        return adapter
    own = adapter.policy  # what trust takes depends on where rounds end
    longest = best.longest if own.trust is None else own.max_draft
    return adapter.with_policy(replace(own, drafts=best.thresholds, max_draft=longest))


def _answering(
    adapter: Adapter, runtime: Runtime | None, options: Mapping[str, Any]
) -> Callable[[ExitPolicy], GenerateFn]:
    """Generation by a policy."""
    if runtime is None:
        return lambda policy: exit_generate_fn(
            adapter.backbone, None if policy is FULL else adapter.exits, policy, **options
        )
    return lambda policy: generate_fn(runtime.generate, policy=policy, **options)


def _timed(
    early: Callable[[ExitPolicy], GenerateFn],
    sweep: Sequence[tuple[Thresholds, ExitPolicy]],
    inputs: Sequence[Mapping[str, Any]],
    rounds: int,
    progress: Any,
) -> list[Drafting]:
    """How fast the policies of a sweep decode, all interleaved; the fastest first."""
    if not inputs:
        raise DataError("There are no prompts to draft on.", "Give some, like those to come.")
    ways = {"full": early(FULL), **{str(n): early(policy) for n, (_, policy) in enumerate(sweep)}}
    timings = time_interleaved(
        ways, inputs, rounds=rounds, progress=progress, drafting=ways.keys() - {"full"}
    )
    full = timings["full"].decode
    found = [
        Drafting(chosen, speedup(full, timings[str(n)].decode), policy.max_draft)
        for n, (chosen, policy) in enumerate(sweep)
    ]
    return sorted(found, key=lambda one: -one.speedup)
