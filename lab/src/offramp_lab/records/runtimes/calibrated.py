"""Thresholds for a number format: chosen on one half of the photographs, measured on the other.

Two kinds: the fastest whose CIDEr is at most 3% below the float32 full model's, without a
guarantee; and the fastest for which the library guarantees that ROUGE-L, the nearest to it that is
a risk, drops by at most 0.03 against the full model of that format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from offramp.adapter import Adapter
from offramp.answers import Answer
from offramp.calibration.calibrate import calibrate
from offramp.calibration.risk_functions import RISKS
from offramp.data.example import Example
from offramp.engine.policy import FULL
from offramp.evaluation.statistics import Measure
from offramp.models.input_processor import InputProcessor
from offramp_lab.records.runtimes.answers import LONGEST, KeptRuntime, cider, keeping, worth
from offramp_lab.records.runtimes.methods import THRESHOLDS, Bench

FORMATS = ("q8_0", "q4_1", "iq4_nl")
"""The quantised ones: f16 answers as PyTorch does."""
TARGET = 0.03
RISK = "rouge_l_drop"
Halves = tuple[Sequence[Example], Sequence[Example]]
"""To choose thresholds on, and to measure on."""


def calibrated(bench: Bench, chosen_on: Sequence[Example]) -> dict[str, Any]:
    """By format, thresholds and what they lose on `bench.photographs`."""
    halves = (chosen_on, bench.photographs)
    return by_format(bench.adapter, bench.encoder, halves, keeping(bench, FORMATS))


def by_format(
    adapter: Adapter,
    encoder: InputProcessor,
    halves: Halves,
    runtimes: Mapping[str, KeptRuntime],
) -> dict[str, Any]:
    """The same of runtimes by their formats, "float32" among them."""
    whole = [cider(runtimes["float32"].answers(encoder, h, FULL), h) for h in halves]
    return {
        "target": TARGET,
        "risk": RISK,
        "chosen_on": len(halves[0]),
        "measured_on": len(halves[1]),
        "formats": {
            layers: _of_format(adapter, encoder, runtime, halves, whole)
            for layers, runtime in tqdm(runtimes.items(), "calibrated", disable=None)
            if layers != "float32"
        },
    }


def _of_format(
    adapter: Adapter,
    encoder: InputProcessor,
    runtime: KeptRuntime,
    halves: Halves,
    whole: Sequence[Measure],
) -> dict[str, Any]:
    """Of one format. whole: CIDEr of the float32 full model, on both halves."""
    [depth] = adapter.policy.thresholds
    choosing, measuring = halves

    def answers(half: Sequence[Example], thresholds: Mapping[int, float]) -> list[Answer]:
        policy = replace(adapter.policy, thresholds=thresholds) if thresholds else FULL
        return runtime.answers(encoder, half, policy)

    def drop(threshold: float) -> float:
        """Of CIDEr on the choosing half."""
        return 1 - cider(answers(choosing, {depth: threshold}), choosing).value / whole[0].value

    def measured(thresholds: Mapping[int, float]) -> dict[str, Any]:
        """On the measuring half: CIDEr against the float32 full model, and the risk against the
        full model of the format."""
        said, full = answers(measuring, thresholds), answers(measuring, {})
        return {
            "thresholds": {str(d): t for d, t in thresholds.items()},
            **worth(cider(said, measuring), whole[1]),
            "risk": float(RISKS[RISK].losses(said, full, measuring).mean()),
        }

    drops = {t: drop(t) for t in reversed(THRESHOLDS)}
    fitting = next(({depth: t} for t, lost in drops.items() if lost <= TARGET), {})
    found = calibrate(
        adapter, encoder, choosing, replace(adapter.policy, thresholds={}),
        target=TARGET, risk=RISK, thresholds=THRESHOLDS, runtime=runtime,
        candidates=len(FORMATS), **LONGEST,  # all on the same photographs
    )  # fmt: skip
    evidence = ("measured", "bound", "confidence", "n", "reason")
    return {
        "calibrated": {
            "drops_tried": {str(t): lost for t, lost in drops.items()},
            **measured(fitting),
        },
        "guaranteed": {
            **{name: getattr(found, name) for name in evidence},
            **measured(found.policy.thresholds),
        },
    }
