"""Calibrate exits for both shipped models and keep what came of it.

calibrated.json, by model: thresholds for each target and risk, found on one set of images and
    measured on another: risk, quality, and decoding time, interleaved.
"violations" in it: how often a guarantee fails over random splits of a pool of images, each
    split calibrated on one half, from the search for a path on, and measured on the other half.
    `offramp_lab.records.simulated` has independent draws.

All settings that are tried on the same images share the errors (`candidates`).
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np

from offramp.adapter.adapter import Adapter
from offramp.adapter.answers import Answer, generate_answers
from offramp.adapter.shipped import TINY
from offramp.calibration.asked import Guarantee
from offramp.calibration.attempts import Draws, ImageRows, images_of
from offramp.calibration.calibrate import GRID, calibrate
from offramp.calibration.profiler import measure_costs
from offramp.calibration.risk_control import control
from offramp.calibration.risk_functions import RISKS
from offramp.calibration.threshold_evaluator import ThresholdEvaluator, path_of, split_images
from offramp.calibration.trial import Calibration
from offramp.cli import demo
from offramp.core.decoding.policy import FULL, ExitPolicy, Thresholds
from offramp.data.scenes.tasks import captions_and_questions
from offramp.evaluation.timing import (
    GenerateFn,
    Timing,
    speedups,
    stock_generate_fn,
    time_interleaved,
)
from offramp.features.input_processor import InputProcessor
from offramp.inputs.example import Example
from offramp_lab.experiments.experiment import bar
from offramp_lab.records.record import Record, Some, asked, named
from offramp_lab.records.subjects import right, trained

RECORD = Record("calibrated")
DEPTHS = (2, 4)
TARGETS, CONFIDENCE = (0.01, 0.02), 0.95
MEASURED = ("disagreement", "exact_match_drop")
METHODS = ("auto", "upper_bound", "learn_then_test")
SETTINGS: list[dict[str, Any]] = [
    {"method": method, "risk_target": target} for method, target in product(METHODS, TARGETS)
]
POLICY = ExitPolicy()


TRAIN, CALIBRATION, TEST = 1200, 2000, 1000
"""Images, each with a caption and two questions."""
POOL, SPLITS = 2400, 50
ASKED = 4
"""Questions about an image of the pool."""
TIMED, ROUNDS = 40, 7


def main() -> None:
    arguments = asked(__doc__, out=RECORD.path, clock=True, models=Some(TINY))
    calibrated = RECORD.read(arguments.out)  # of other models too
    violations = calibrated.setdefault("violations", {})
    violations |= {"confidence": CONFIDENCE, "stated_share": 1 - CONFIDENCE}
    for kind in arguments.models:
        adapter, encoder = trained(kind, _examples("train", TRAIN), depths=DEPTHS, steps=1000)
        calibrated[kind] = _calibrated(adapter, encoder, arguments.clock)
        print(json.dumps(calibrated[kind]), file=sys.stderr)
        violations[kind] = _violations(adapter, encoder)
        print(json.dumps(violations[kind]), file=sys.stderr)
    RECORD.write(calibrated, arguments.out, **RECORD.origin(_examples("test", TEST)))


@cache
def _examples(split: str, images: int, start: int = 0, asked: int = 2) -> tuple[Example, ...]:
    """A caption and up to so many questions of each image."""
    return tuple(captions_and_questions(split, images, start, asked))


# -- calibrated.json ------------------------------------------------------------------------------


def _calibrated(
    adapter: Adapter, encoder: InputProcessor, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    held_out = _examples("calibration", CALIBRATION)
    costs = measure_costs(adapter.backbone, encoder.prompts(held_out[:1]), adapter.exits)
    calibrations = [
        calibrate(
            adapter,
            encoder,
            held_out,
            POLICY,
            target=target,
            confidence=CONFIDENCE,
            risk=risk,
            candidates=len(MEASURED) * len(TARGETS),
            costs=costs,
            progress=bar(f"{risk} {target}"),
            **demo.OPTIONS,
        )
        for risk in MEASURED
        for target in TARGETS
    ]
    methods: dict[str, GenerateFn] = {
        "generate": stock_generate_fn(adapter.backbone, **demo.OPTIONS),
        "full": demo.generate_fn(adapter, FULL),
    }
    methods |= {
        str(i): demo.generate_fn(adapter, calibration.policy)
        for i, calibration in enumerate(calibrations)
    }
    timed = [encoder.prompts([e]) for e in _examples("test", TIMED)]
    timings = time_interleaved(methods, timed, rounds=ROUNDS, progress=bar("timing"), clock=clock)
    full = _answers(adapter, encoder, TEST, FULL)
    return [
        {"clock": named(clock)}
        | _row(c, timings, str(i), full, _answers(adapter, encoder, TEST, c.policy))
        for i, c in enumerate(calibrations)
    ]


def _answers(adapter: Adapter, encoder: InputProcessor, n: int, policy: ExitPolicy) -> list[Answer]:
    examples = _examples("test", n)
    return generate_answers(adapter, encoder, examples, policy, batch_size=64, **demo.OPTIONS)


def _row(
    calibration: Calibration,
    timings: dict[str, Timing],
    name: str,
    full: Sequence[Answer],
    early: Sequence[Answer],
) -> dict[str, Any]:
    pictures = len(full) // 3
    asked = _examples("test", pictures)
    right_full, right_early = right(full, asked), right(early, asked)
    losses = RISKS[calibration.risk].losses(early, full, asked)
    return {
        "risk": calibration.risk,
        "risk_target": calibration.target,
        "thresholds": {str(d): t for d, t in calibration.policy.thresholds.items()},
        "risk_calibration": calibration.measured,
        "risk_test": float(Draws.by(calibration.unit, losses, images_of(asked)).risk),
        "n_calibration": calibration.n,
        "n_test": len(asked),
        **speedups(timings, name),
        "quality_drop": float((right_full - right_early).mean()),
    }


# -- violations -----------------------------------------------------------------------------------


def _violations(adapter: Adapter, encoder: InputProcessor) -> list[dict[str, Any]]:
    half = POOL // 2
    pool = _examples("calibration", half, 100_000, ASKED)
    pool += _examples("test", POOL - half, 100_000, ASKED)
    costs = measure_costs(adapter.backbone, encoder.prompts(pool[:1]), adapter.exits)
    whole = ThresholdEvaluator.of(
        adapter, encoder, pool, POLICY, RISKS[MEASURED[0]], costs=costs, **demo.OPTIONS
    )
    splits = [_split(whole, *_halves(pool, seed)) for seed in bar("splits")(range(SPLITS))]
    rows = []
    for risk in MEASURED:
        evaluator = replace(whole, risk=RISKS[risk])
        lost = cache(lambda items, own=evaluator: own.losses(dict(items)))
        outcomes = [_outcomes(evaluator, lost, split) for split in bar(risk)(splits)]
        rows += [
            {
                "risk": risk,
                **setting,
                "n_pool": POOL,
                "answers": len(pool),
                **_shares([o[i] for o in outcomes], setting["risk_target"]),
            }
            for i, setting in enumerate(SETTINGS)
        ]
    return rows


def _halves(pool: Sequence[Example], seed: int) -> tuple[Any, Any]:
    """Rows of two halves that share no image."""
    groups = sorted({e.group for e in pool})
    first = set(np.random.default_rng(seed).permutation(groups)[: len(groups) // 2].tolist())
    inside = np.array([e.group in first for e in pool])
    return np.flatnonzero(inside), np.flatnonzero(~inside)


@dataclass(frozen=True)
class _Split:
    """Rows of a pool's halves. path: found on images of the first. tested: its other images."""

    calibration: Any
    test: Any
    path: Sequence[Thresholds]
    tested: Sequence[ImageRows]


def _split(whole: ThresholdEvaluator, calibration: Any, test: Any) -> _Split:
    half = whole.part(calibration)
    search, tested = split_images(half, images_of(half.examples))
    return _Split(calibration, test, path_of(half, search, GRID), tested)


def _outcomes(
    evaluator: ThresholdEvaluator, lost: Callable[..., Any], split: _Split
) -> list[dict[str, Any]]:
    """For each setting: the thresholds chosen on one half, their risk on the other and overall."""
    columns: list[Any] = []
    for thresholds in split.path:
        losses = lost(tuple(thresholds.items()))[split.calibration]
        columns.append(Draws.by("image", losses, split.tested).sums)
        if columns[-1].mean() > max(TARGETS):  # no walk goes on behind it
            break
    losses = np.stack(columns, 1)
    outcomes = []
    for setting in SETTINGS:
        target, method = setting["risk_target"], setting["method"]
        level = Guarantee(target, CONFIDENCE).level(1)
        index = control(losses, target, level, method, evaluator.risk.low).index
        if index is None:
            outcomes.append({"index": None, "test": 0.0})
            continue
        everywhere = lost(tuple(split.path[index].items()))
        outcomes.append({"index": index, "test": float(everywhere[split.test].mean())})
    return outcomes


def _shares(outcomes: Sequence[dict[str, Any]], target: float) -> dict[str, Any]:
    return {
        "splits": len(outcomes),
        "promised": sum(outcome["index"] is not None for outcome in outcomes),
        "violations": sum(outcome["test"] > target for outcome in outcomes),
        "mean_risk_test": float(np.mean([outcome["test"] for outcome in outcomes])),
        "largest_risk_test": max(outcome["test"] for outcome in outcomes),
    }


if __name__ == "__main__":
    main()
