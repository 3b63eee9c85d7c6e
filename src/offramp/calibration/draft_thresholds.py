"""Where lossless decoding should draft: every threshold gives the same output, so time decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

from offramp.adapter import Adapter
from offramp.engine.policy import ExitPolicy, Thresholds
from offramp.errors import DataError
from offramp.evaluation.timing import GenerateFn, exit_generate_fn, speedup, time_interleaved

THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 0.95)


@dataclass(frozen=True)
class Drafting:
    """Thresholds to draft by, and how fast they decode against the full model."""

    thresholds: Thresholds
    speedup: float


def draft_policies(adapter: Adapter, thresholds: Sequence[float] = THRESHOLDS) -> list[ExitPolicy]:
    """Lossless policies that draft by each exit alone and by all, at every threshold.

    What else stands in the adapter's policy (score, shortlist, longest draft) is kept.
    """
    depths = adapter.exits.depths
    places = dict.fromkeys([*((depth,) for depth in depths), depths])
    sweep = [Thresholds.shared(place, t) for place in places for t in thresholds]
    return [replace(adapter.policy, kv="recompute", lossless=True, drafts=d) for d in sweep]


def draft_speeds(
    adapter: Adapter,
    inputs: Sequence[Mapping[str, Any]],
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    rounds: int = 3,
    progress: Any = iter,
    **options: Any,
) -> list[Drafting]:
    """Time lossless decoding by each of `draft_policies`, interleaved; the fastest first.

    inputs: processor output, batch 1 each, like the prompts to come. options: of generation.

    Raises:
        DataError: no inputs.
    """
    if not inputs:
        raise DataError("There are no prompts to draft on.", "Give some, like those to come.")
    lossless = partial(exit_generate_fn, adapter.backbone, adapter.exits)
    sweep = {str(n): policy for n, policy in enumerate(draft_policies(adapter, thresholds))}
    generators: dict[str, GenerateFn] = {
        "full": exit_generate_fn(adapter.backbone, **options),
        **{name: lossless(policy=policy, **options) for name, policy in sweep.items()},
    }
    timings = time_interleaved(generators, inputs, rounds=rounds, progress=progress)
    full = timings.pop("full")
    order = sorted(timings, key=lambda name: median(timings[name].decode))
    return [
        Drafting(Thresholds(sweep[name].drafts), speedup(full.decode, timings[name].decode))
        for name in order
    ]


def with_drafts(adapter: Adapter, drafting: Sequence[Drafting]) -> Adapter:
    """The adapter with the fastest drafts; as it is, where none beats the full model.

    The guarantee of its early exits stays: they are not touched.
    """
    best = drafting[0]
    if best.speedup <= 1.0:
        return adapter
    return adapter.with_policy(replace(adapter.policy, drafts=best.thresholds))
