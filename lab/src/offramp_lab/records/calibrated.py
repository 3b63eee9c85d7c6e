"""Calibrate exits for both shipped models and keep what came of it.

calibrated.json, by model: thresholds for each target and risk, found on one set of images and
    measured on another: risk, quality, and decoding time (of the thread), interleaved.
"violations" in it: how often a guarantee fails over random splits of a pool of images, each
    split calibrated on one half, from the search for a path on, and measured on the other half.
    `offramp_lab.records.simulated` has independent draws.

All settings that are tried on the same images share the errors (`candidates`).
"""

import json
import sys
import time
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
from offramp.cli import demo
from offramp.core.decoding.policy import FULL, ExitPolicy, Thresholds
from offramp.data.scenes.tasks import captions_and_questions
from offramp.evaluation.timing import GenerateFn, speedups, stock_generate_fn, time_interleaved
from offramp.features.input_processor import InputProcessor
from offramp.inputs.example import Example
from offramp_lab.experiments.experiment import bar
from offramp_lab.records.record import Record
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


def figures(_: object) -> dict[str, Any]:
    found = dict[str, Any]()
    violations: dict[str, Any] = {"confidence": CONFIDENCE, "stated_share": 1 - CONFIDENCE}
    for kind in TINY:
        model = trained(kind, _examples("train", TRAIN), depths=DEPTHS, steps=1000)
        found[kind], violations[kind] = _calibrated(*model), _violations(*model)
        print(json.dumps(found[kind]), json.dumps(violations[kind]), sep="\n", file=sys.stderr)
    return {**found, "violations": violations}


@cache
def _examples(split: str, images: int, start: int = 0, asked: int = 2) -> tuple[Example, ...]:
    """A caption and up to so many questions of each image."""
    return tuple(captions_and_questions(split, images, start, asked))


# -- calibrated.json ------------------------------------------------------------------------------


def _calibrated(adapter: Adapter, encoder: InputProcessor) -> list[dict[str, Any]]:
    held_out, tested = _examples("calibration", CALIBRATION), _examples("test", TEST)
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
        for risk, target in product(MEASURED, TARGETS)
    ]
    methods: dict[str, GenerateFn] = {
        "generate": stock_generate_fn(adapter.backbone, **demo.OPTIONS),
        "full": demo.generate_fn(adapter, FULL),
        **{str(i): demo.generate_fn(adapter, c.policy) for i, c in enumerate(calibrations)},
    }
    timed, clock = [encoder.prompts([e]) for e in _examples("test", TIMED)], time.thread_time
    timings = time_interleaved(methods, timed, rounds=ROUNDS, progress=bar("timing"), clock=clock)
    full = _answers(adapter, encoder, tested, FULL)
    right_full, rows = right(full, tested), []
    for i, found in enumerate(calibrations):
        early = _answers(adapter, encoder, tested, found.policy)
        losses = RISKS[found.risk].losses(early, full, tested)
        rows.append(
            {
                "clock": "thread",
                "risk": found.risk,
                "risk_target": found.target,
                "thresholds": {str(d): t for d, t in found.policy.thresholds.items()},
                "risk_calibration": found.measured,
                "risk_test": float(Draws.by(found.unit, losses, images_of(tested)).risk),
                "n_calibration": found.n,
                "n_test": len(tested),
                **speedups(timings, str(i)),
                "quality_drop": float((right_full - right(early, tested)).mean()),
            }
        )
    return rows


def _answers(
    adapter: Adapter, encoder: InputProcessor, asked: Sequence[Example], policy: ExitPolicy
) -> list[Answer]:
    return generate_answers(adapter, encoder, asked, policy, batch_size=64, **demo.OPTIONS)


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
) -> list[float | None]:
    """For each setting: the risk on the other half of the thresholds chosen on one, if any are."""
    columns: list[Any] = []
    for thresholds in split.path:
        losses = lost(tuple(thresholds.items()))[split.calibration]
        columns.append(Draws.by("image", losses, split.tested).sums)
        if columns[-1].mean() > max(TARGETS):  # no walk goes on behind it
            break
    losses = np.stack(columns, 1)
    risks: list[float | None] = []
    for setting in SETTINGS:
        target, method = setting["risk_target"], setting["method"]
        level = Guarantee(target, CONFIDENCE).level(1)
        index = control(losses, target, level, method, evaluator.risk.low).index
        if index is None:
            risks.append(None)
        else:
            everywhere = lost(tuple(split.path[index].items()))
            risks.append(float(everywhere[split.test].mean()))
    return risks


def _shares(risks: Sequence[float | None], target: float) -> dict[str, Any]:
    """Of all splits; one without a promise has no risk."""
    fresh = [risk or 0.0 for risk in risks]
    return {
        "splits": len(risks),
        "promised": len(risks) - risks.count(None),
        "violations": sum(risk > target for risk in fresh),
        "mean_risk_test": float(np.mean(fresh)),
        "largest_risk_test": max(fresh),
    }


if __name__ == "__main__":
    RECORD.run(__doc__, figures)
