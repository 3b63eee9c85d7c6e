"""Lossless decoding, trust and thresholds side by side: the fastest that keeps what was asked.

Trust is tested first, where exits draft on. How far thresholds would go is estimated from some of
the answers; they are tested, as one attempt more, only if they look faster than what passed.
Lossless answers lose nothing, so they are chosen where they are faster than all that passed; not
where a vision tower rounds, for which they are other answers than the full model's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np

from offramp.adapter.adapter import Adapter
from offramp.adapter.answers import Answer
from offramp.adapter.runtime import Asked, Runtime
from offramp.calibration.asked import Guarantee
from offramp.calibration.calibrate import COARSE, calibrate, with_attempts
from offramp.calibration.risk_functions import RISKS, Judged
from offramp.calibration.threshold_evaluator import ThresholdEvaluator
from offramp.calibration.trial import Calibration, Way
from offramp.calibration.trust_path import NOTHING
from offramp.core.decoding.policy import FULL, ExitPolicy, Thresholds, resolved
from offramp.core.errors import DataError, InputError
from offramp.data.item import Item
from offramp.evaluation.statistics import Measure, interval
from offramp.evaluation.timing import clock_on, generate_fn, in_turn, timed
from offramp.features.input_processor import InputProcessor
from offramp.features.vision_engine import ROUNDED
from offramp.inputs.example import Example
from offramp.promises.conditions import samples

SOME = 100
"""Answers by which it is estimated how far thresholds go."""
TIMED = 20
"""Prompts that are answered in every way in turn."""

Seconds = Callable[[Mapping[str, ExitPolicy]], Mapping[str, Sequence[float]]]
"""Returns how long each policy takes, by name, over the same answers in turn; a policy that this
model cannot follow is left out."""


def by_trust(adapter: Adapter, **options: Any) -> ExitPolicy | None:
    """Return the adapter's policy for a search of trust; None: its exits do not draft on, or their
    drafts are never taken. options: of generation."""
    own = adapter.policy
    if not adapter.exits.draft_on or own.drafter or samples(adapter.backbone, options):
        return None
    return replace(own, thresholds={}, lossless=False, trust=NOTHING)


def fastest(
    adapter: Adapter,
    encoder: InputProcessor,
    examples: Sequence[Example | Item],
    policy: ExitPolicy,
    *,
    runtime: Runtime | None = None,
    seconds: Seconds | None = None,
    thresholds: Sequence[float] | None = None,
    first: float | str | None = None,
    **how: Any,
) -> Calibration:
    """Calibrate the fastest way to answer; the compared ones are its `ways`.

    Arguments as of `calibrate`; thresholds and first are those of the policy, which is tested
    first. seconds: of the ways; None: measured here.
    """
    known: list[Answer] = []
    test = partial(
        calibrate, encoder=encoder, examples=examples, runtime=runtime, known=known, **how
    )
    options = {name: value for name, value in how.items() if name not in _KNOWN}
    judged = [*map(Judged.of, examples)]
    if seconds is None and isinstance(runtime, Asked):
        seconds = partial(_waited, runtime, judged[:TIMED], options)
    elif seconds is None:
        seconds = partial(_seconds, runtime or adapter, encoder, judged[:TIMED], options)
    found = test(adapter=adapter, policy=policy, thresholds=thresholds, first=first)
    lossless = _lossless(adapter, found.policy)
    tried = _Tried({} if lossless is None else {"lossless": lossless}, {})
    if not found.reason:
        tried = tried.with_found(found)
    likely = None
    if policy.trust is not None:
        likely = _likely(adapter, encoder, judged, known, runtime, how, options)
    if likely is not None:
        tried = tried.and_with("thresholds", *likely)
    took = seconds(tried.policies)
    others = [_times(took, name) for name in ("trust", "lossless")]
    if likely is not None and _times(took, "thresholds") > max(others):
        plain = replace(likely[0], thresholds={})
        again = test(adapter=with_attempts(adapter, found), policy=plain)
        found = replace(found, attempts=again.attempts)
        if not again.reason:
            tried = tried.with_found(again)
            took = seconds(tried.policies)
            found = again if _times(took, "thresholds") > _times(took, "trust") else found
    found = replace(found, ways=tried.ways(took))
    return found if lossless is None else _chosen(found, lossless, took)


_KNOWN = {
    *(field.name for field in fields(Guarantee)),
    "batch_size",
    "costs",
    "frequencies",
    "progress",
}
"""What `calibrate` takes that is no option of generation."""


@dataclass(frozen=True)
class _Tried:
    """Policies by the name of their way, and what they lose: the risk, the answers that it was
    measured on, and whether that was a test."""

    policies: Mapping[str, ExitPolicy]
    risks: Mapping[str, tuple[float, int, bool]]

    def and_with(
        self, name: str, policy: ExitPolicy, risk: float, answers: int, promised: bool = False
    ) -> _Tried:
        risks = {**self.risks, name: (risk, answers, promised)}
        return _Tried({**self.policies, name: policy}, risks)

    def with_found(self, found: Calibration) -> _Tried:
        """Add what passed its test."""
        assert found.measured is not None
        name, _ = way_of(found.policy)
        return self.and_with(name, found.policy, found.measured, found.answers, True)

    def ways(self, took: Mapping[str, Sequence[float]]) -> tuple[Way, ...]:
        return tuple(
            Way(name, way_of(policy)[1], _times(took, name), *self.risks.get(name, ()))
            for name, policy in self.policies.items()
            if name in took
        )


def way_of(policy: ExitPolicy) -> tuple[str, str]:
    """Return the name of a policy's way to answer, and its setting in words."""
    if policy.lossless:
        return "lossless", f"at most {policy.max_draft} drafts"
    return policy.decides


def _chosen(
    found: Calibration, lossless: ExitPolicy, took: Mapping[str, Sequence[float]]
) -> Calibration:
    """What passed; or lossless decoding, where its advantage is beyond the interval of the mean."""
    own, _ = way_of(found.policy)
    if found.reason or not {own, "lossless"} <= took.keys():
        return found
    both = np.stack([took[own], took["lossless"]], 1)
    sure = interval(Measure(float("nan"), both))
    if sure is None or sure[0] <= 1:
        return found
    return replace(
        found,
        policy=lossless,
        measured=None,
        bound=None,
        speedup=None,
        reason=f"Lossless decoding is faster than {own} and changes nothing.",
    )


def _lossless(adapter: Adapter, found: ExitPolicy) -> ExitPolicy | None:
    """Return the policy that drafts as the adapter's own does, or by the thresholds found; None:
    by none, or its answers lose what a vision tower rounds."""
    own = adapter.policy
    if adapter.backbone.vision_engine in ROUNDED:
        return None
    drafted = own.thresholds or found.thresholds
    if not (drafted or own.drafts or adapter.exits.draft_on):
        return None
    return replace(own, lossless=True, trust=None, thresholds=drafted)


def _likely(
    adapter: Adapter,
    encoder: InputProcessor,
    judged: Sequence[Example],
    known: Sequence[Answer],
    runtime: Runtime | None,
    how: Mapping[str, Any],
    options: Mapping[str, Any],
) -> tuple[ExitPolicy, float, int] | None:
    """Return the policy of the lowest thresholds at which some of the answers lose at most the
    target, what they lose, and how many they are; None where none does, or where this model cannot
    follow thresholds. known: of `calibrate`."""
    each = -(-len(judged) // SOME)
    some = judged[::each]
    own = resolved(replace(adapter.policy, trust=None, lossless=False), encoder.backbone)
    try:
        whole = ThresholdEvaluator.of(
            adapter,
            encoder,
            some,
            own,
            RISKS[how.get("risk", Guarantee.risk)],
            runtime=runtime,
            known=[*known[::each]],
            batch_size=how.get("batch_size", 64),
            **options,
        )
    except DataError:  # scores that separate no tokens
        return None
    if whole.risk.weighed is not None:
        whole = replace(whole, risk=whole.risk.weighed(how.get("frequencies") or some))
    grid, low, high = sorted(COARSE), 0, len(COARSE)
    passed: tuple[ExitPolicy, float, int] | None = None
    while low < high:
        middle = (low + high) // 2
        point = Thresholds.shared(whole.depths, grid[middle])
        try:
            risk = float(whole.losses(point).mean())
        except InputError:  # such as exits that an engine's files lack
            return None
        if risk <= how.get("target", Guarantee.target):
            high, passed = middle, (whole.at(point), risk, len(some))
        else:
            low = middle + 1
    return passed


def _times(took: Mapping[str, Sequence[float]], name: str) -> float:
    """How many times as fast as full depth; 0 where it was not tried."""
    return float(np.sum(took["full"]) / np.sum(took[name])) if name in took else 0.0


def _seconds(
    model: Adapter | Runtime,
    encoder: InputProcessor,
    examples: Sequence[Example],
    options: Mapping[str, Any],
    policies: Mapping[str, ExitPolicy],
) -> dict[str, list[float]]:
    """Answer the examples in every way in turn."""
    clock = clock_on(encoder.backbone.device.type)
    prompts = [encoder.prompts([example]) for example in examples]
    ways = {
        name: partial(timed, generate_fn(model.generate, policy=policy, **options), clock=clock)
        for name, policy in {"full": FULL, **policies}.items()
    }
    for name, way in [*ways.items()]:
        try:
            way(prompts[0])
        except InputError:  # such as drafts, where states cannot be taken back
            del ways[name]
    runs = in_turn(ways, prompts, rounds=1)
    return {name: [whole for whole, _, _ in rounds[0]] for name, rounds in runs.items()}


def _waited(
    server: Asked,
    examples: Sequence[Example],
    options: Mapping[str, Any],
    policies: Mapping[str, ExitPolicy],
) -> dict[str, list[float]]:
    """Seconds that a server takes for each answer, one after the other. Whether it drafts was
    decided as it started: lossless decoding is left out where it does not."""
    ways = {
        name: policy
        for name, policy in {"full": FULL, **policies}.items()
        if server.drafts or not policy.lossless
    }
    took: dict[str, list[float]] = {name: [] for name in ways}
    for example in (examples[0], *examples):  # the first warms up
        for name, policy in ways.items():
            begin = time.perf_counter()
            server.answers([example], policy, **options)
            took[name].append(time.perf_counter() - begin)
    return {name: seconds[1:] for name, seconds in took.items()}


def compared(ways: Sequence[Way]) -> str:
    """Return in a sentence which way is the fastest, and the speeds of the others."""
    best, *others = sorted(ways, key=lambda way: -way.times)
    lossless = " and changes nothing" if best.risk is None else ""
    told = ", ".join(
        f"{way.name} {way.times:.2f}x{'' if way.promised or way.risk is None else ' (estimated)'}"
        for way in others
    )
    return (
        f"Fastest at what may be lost: {best.name}, {best.times:.2f}x full depth{lossless}"
        f"{'; ' if told else ''}{told}."
    )
