"""Where lossless decoding should draft: every threshold gives the same output, so time decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

from offramp.adapter import Adapter
from offramp.errors import DataError
from offramp.evaluation.timing import GenerateFn, exit_generate_fn, speedup, time_interleaved

THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 0.95)


@dataclass(frozen=True)
class Drafting:
    """One way to draft: thresholds by depth, and its decoding against the full model's."""

    thresholds: Mapping[int, float]
    speedup: float


def draft_speeds(
    adapter: Adapter,
    inputs: Sequence[Mapping[str, Any]],
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    rounds: int = 3,
    progress: Any = iter,
    **options: Any,
) -> list[Drafting]:
    """Race lossless decoding by each exit alone and by all, at every threshold; fastest first.

    inputs: processor output, batch 1 each, like the prompts to come; what stands in the adapter's
    policy (score, shortlist, longest draft) is kept. options: of generation.

    Raises:
        DataError: no inputs.
    """
    if not inputs:
        raise DataError("There are no prompts to draft on.", "Give some, like those to come.")
    depths = adapter.exits.depths
    places = dict.fromkeys([*((depth,) for depth in depths), depths])
    tried = [dict.fromkeys(place, t) for place in places for t in thresholds]
    way = partial(exit_generate_fn, adapter.backbone, adapter.exits)
    ways: dict[str, GenerateFn] = {"full": exit_generate_fn(adapter.backbone, **options)}
    for number, drafts in enumerate(tried):
        policy = replace(adapter.policy, kv="recompute", lossless=True, drafts=drafts)
        ways[str(number)] = way(policy=policy, **options)
    timings = time_interleaved(ways, inputs, rounds=rounds, progress=progress)
    full = timings.pop("full")
    order = sorted(timings, key=lambda number: median(timings[number].decode))
    return [Drafting(tried[int(n)], speedup(full.decode, timings[n].decode)) for n in order]


def with_drafts(adapter: Adapter, found: Sequence[Drafting]) -> Adapter:
    """The adapter, drafting in the fastest way found; as it is, where none beats the full model.

    What is promised of its early exits stays: they are not touched.
    """
    best = found[0]
    if best.speedup <= 1.0:
        return adapter
    return adapter.with_policy(replace(adapter.policy, drafts=best.thresholds))
