"""Thresholds with a promise: on answers to come, the risk stays below a target at a confidence.

One pass of the full model over the examples tells what it answers, a replay of these answers what
the exits would have said; only answers that thresholds change are generated again. A path of
thresholds, the safest first, is then tested until one fails (`risk_control`). With several exits
the path is found on a part of the images that is not tested on (`threshold_search`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from offramp.adapter import Adapter
from offramp.answers import Runtime
from offramp.calibration.cost_model import Costs
from offramp.calibration.risk_control import METHODS, TESTS, control, samples_needed, upper_bound
from offramp.calibration.risk_functions import RISKS
from offramp.calibration.threshold_evaluator import ThresholdEvaluator
from offramp.calibration.threshold_search import Array, candidates, pareto_path
from offramp.data.decontamination import check_no_overlap, picture_digests
from offramp.data.example import Example, examples_digest, split_examples
from offramp.engine.policy import ExitPolicy, Thresholds, policy_to_json
from offramp.errors import DataError, InputError, check_known
from offramp.models.input_processor import InputProcessor

GRID = (0.999, 0.995, 0.99, 0.98, 0.97, 0.95, 0.92, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
SEARCH = 0.3
"""Share of the pictures on which several exits' path is found."""


# -- what is asked, and what is found --------------------------------------------------------------


@dataclass(frozen=True)
class Promise:
    """What is asked for: P(risk <= target) >= confidence, and the method to find it by."""

    target: float = 0.01
    confidence: float = 0.95
    risk: str = "disagreement"
    method: str = "auto"

    def __post_init__(self) -> None:
        if not (0 < self.target < 1 and 0 < self.confidence < 1):
            raise InputError(
                f"Target {self.target} and confidence {self.confidence} must lie between 0 and 1.",
                "For example target 0.01 (1% of answers may differ) and confidence 0.95.",
            )
        check_known("Risk", [self.risk], tuple(RISKS))
        check_known("Method", [self.method], METHODS)


@dataclass(frozen=True)
class Point:
    """A point of the path.

    risk, bound: measured on the testing examples, and what the method bounds it by at the
        confidence. seconds: predicted, of a decoded token; None where no replay tells the depths.
    """

    thresholds: Thresholds
    risk: float
    bound: float
    seconds: float | None


@dataclass(frozen=True)
class Calibration:
    """What was promised, and on what evidence.

    policy: thresholds that passed, exits that none uses left out; without thresholds if nothing
        could be promised, and then `reason` says why.
    method: that decided; see `offramp.calibration.risk_control.control`, as for `monotone`.
    measured, bound: the risk of the n tested answers, and its upper bound at the confidence.
    needed: answers that would promise the target at the risk measured (where nothing passed: at
        the safest point); None where that is above the target, so that no number would.
    speedup: of decoding, predicted from measured costs.
    path: what was tested, up to the first failure.
    runtime: whose answers the promise is about, by name; None: PyTorch's.
    """

    policy: ExitPolicy
    risk: str
    target: float
    confidence: float
    method: str
    monotone: bool
    measured: float | None
    bound: float | None
    n: int
    needed: int | None
    speedup: float | None
    reason: str
    path: tuple[Point, ...]
    data_digest: str
    runtime: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As it is stored in an adapter; thresholds are keyed by depth."""
        path = [{**asdict(point), "thresholds": point.thresholds.to_json()} for point in self.path]
        return {**asdict(self), "policy": policy_to_json(self.policy), "path": path}


def calibrated(adapter: Adapter, found: Calibration, examples: Sequence[Example]) -> Adapter:
    """The adapter with the policy that was found, the promise, and the pictures it stands on."""
    seen = {**adapter.seen, "calibration": sorted(picture_digests(examples))}
    return replace(adapter.with_policy(found.policy, found.to_json()), seen=seen)


# -- calibration ----------------------------------------------------------------------------------


def calibrate(
    adapter: Adapter,
    encoder: InputProcessor,
    examples: Sequence[Example],
    policy: ExitPolicy,
    *,
    target: float = 0.01,
    confidence: float = 0.95,
    risk: str = "disagreement",
    method: str = "auto",
    thresholds: Sequence[float] = GRID,
    batch_size: int = 64,
    costs: Costs | None = None,
    runtime: Runtime | None = None,
    progress: Any = iter,
    **options: Any,
) -> Calibration:
    """The fastest thresholds found that keep P(risk <= target) >= confidence.

    One exit is tested along the grid `thresholds`. Several are, each with its own threshold or
    off, along a path found on `SEARCH` of the images, if costs are given and the policy can be
    replayed (greedy, kv "recompute", a score of `SCORES`); otherwise all share one threshold.

    Args:
        examples: drawn like those to come, each on its own, and never trained on.
        policy: what to calibrate; its own thresholds are ignored, its score and KV policy are kept.
        risk: of `RISKS`. method: of `offramp.calibration.risk_control.METHODS`.
        costs: of decoding on this machine, by `offramp.calibration.profiler.measure_costs`; None:
            no speed is predicted, and the fastest thresholds are the last that keep the risk.
        runtime: answers in the adapter's place, e.g. with quantised weights: the promise is then of
            its answers, and all exits share one threshold.
        options: of generation, such as max_new_tokens.

    Raises:
        InputError: an argument cannot be used.
        DataError: no examples, pictures that training used, no references where the risk needs
            them, a full model that is wrong everywhere, or scores that are constant or NaN.
    """
    asked = Promise(target, confidence, risk, method)
    if policy.lossless:
        raise InputError(
            "Lossless answers are the full model's, so there is no risk to calibrate.",
            "Calibrate a policy with lossless=False.",
        )
    measure = RISKS[risk]
    _check_examples(adapter, examples, risk)
    whole = ThresholdEvaluator.of(
        adapter, encoder, examples, policy, measure,
        costs=costs, batch_size=batch_size, runtime=runtime, **options,
    )  # fmt: skip
    if measure.quality is not None and not measure.quality(whole.full, examples).any():
        raise DataError(
            f"The full model is wrong on all {len(examples)} examples, so no drop can be measured.",
            "Check the prompts and the answers, or calibrate without labels: --risk disagreement.",
        )
    path, tested = path_of(whole, thresholds)
    columns, points = _walk(tested, progress(path), asked)
    found = _decide(tested, columns, points, asked, examples_digest(examples))
    return replace(found, runtime=None if runtime is None else runtime.name)


def _check_examples(adapter: Adapter, examples: Sequence[Example], risk: str) -> None:
    if not examples:
        raise DataError(
            "There are no examples to calibrate on.", "Check the data's path and split."
        )
    unlabelled = [e.key for e in examples if not e.answers]
    if RISKS[risk].quality is not None and unlabelled:
        raise DataError(
            f"{len(unlabelled)} examples, such as {unlabelled[0]!r}, have no answer to compare "
            f"with, and the risk {risk!r} needs one.",
            "Add answers, or calibrate without labels: --risk disagreement or consistency.",
        )
    check_no_overlap(
        adapter.seen, examples, ("train",), "Calibrate on pictures that training has not seen."
    )


def path_of(
    whole: ThresholdEvaluator, grid: Sequence[float]
) -> tuple[list[Thresholds], ThresholdEvaluator]:
    """The path, and the examples to test it on."""
    depths = whole.depths
    if len(depths) == 1 or whole.replay is None or whole.costs is None:
        return [Thresholds.shared(depths, t) for t in sorted(grid, reverse=True)], whole
    parts = split_examples(whole.examples, {"search": SEARCH, "test": 1 - SEARCH}, seed=0)
    searched = {id(example) for example in parts["search"]}
    inside = np.array([id(example) in searched for example in whole.examples])
    search = whole.part(np.flatnonzero(inside))
    assert search.replay is not None
    path = pareto_path(search.replay, candidates(depths, grid), search.time, grid)
    return path, whole.part(np.flatnonzero(~inside))


def _walk(
    tested: ThresholdEvaluator, path: Iterable[Thresholds], asked: Promise
) -> tuple[Array, list[Point]]:
    """Losses [n, K] and points of the path, up to the first that fails."""
    method = "upper_bound" if asked.method == "auto" else asked.method
    columns = [np.zeros((len(tested.examples), 0))]
    points: list[Point] = []
    for thresholds in path:
        losses = tested.losses(thresholds)
        columns.append(losses[:, None])
        bound = upper_bound(losses, asked.confidence, method)
        points.append(Point(thresholds, float(losses.mean()), bound, tested.seconds(thresholds)))
        if TESTS[method](losses, asked.target) > 1 - asked.confidence:
            break
    return np.concatenate(columns, 1), points


def _decide(
    tested: ThresholdEvaluator, losses: Array, points: Sequence[Point], asked: Promise, digest: str
) -> Calibration:
    """The fastest point that keeps the promise, if it beats the full model; else none, and why."""
    decision = control(losses, asked.target, asked.confidence, asked.method, tested.risk.low)
    passed = [] if decision.index is None else points[: decision.index + 1]
    # All that passed keep the promise, so any may be taken: the last where no times are known.
    chosen = min(reversed(passed), key=lambda point: point.seconds or 0.0, default=None)
    measured = (chosen or points[0]).risk if points else 0.0
    needed = samples_needed(asked.target, asked.confidence, decision.method, measured)
    full = tested.seconds({})
    speedup = full / chosen.seconds if chosen and full and chosen.seconds else None
    reason = ""
    if not points or (speedup is not None and speedup <= 1):
        chosen = speedup = None
        reason = "No exit is predicted to pay: its checks cost more than they save."
    elif chosen is None:
        reason = _too_little(points[0], tested, asked.target, needed)
    return Calibration(
        policy=replace(tested.policy, thresholds=chosen.thresholds if chosen else Thresholds()),
        risk=asked.risk,
        target=asked.target,
        confidence=asked.confidence,
        method=decision.method,
        monotone=decision.monotone,
        measured=chosen.risk if chosen else None,
        bound=chosen.bound if chosen else None,
        n=len(tested.examples),
        needed=needed,
        speedup=speedup,
        reason=reason,
        path=tuple(points),
        data_digest=digest,
    )


def _too_little(
    safest: Point, tested: ThresholdEvaluator, target: float, needed: int | None
) -> str:
    measured = (
        f"At the safest thresholds the risk is {safest.risk:.4f} on {len(tested.examples)} answers"
    )
    if needed is None:
        return f"{measured}, which is above the target: no number of answers would do."
    return f"{measured}; to promise {target:g} at that risk, about {needed} answers are needed."
