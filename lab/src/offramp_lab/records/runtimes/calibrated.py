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
from offramp.calibration.calibrate import calibrate
from offramp.calibration.risk_functions import RISKS
from offramp.data.example import Example
from offramp.engine.policy import FULL, ExitPolicy
from offramp.evaluation.statistics import Measure
from offramp.models.input_processor import InputProcessor
from offramp_lab.records.runtimes.answers import (
    LONGEST,
    cider,
    in_llama,
    in_torch,
    kept_answers,
    worth,
)
from offramp_lab.records.runtimes.kept import KeptRuntime
from offramp_lab.records.runtimes.methods import THRESHOLDS, Bench

FORMATS = ("q8_0", "q4_1", "iq4_nl")
"""The quantised ones: f16 answers as PyTorch does."""
TARGET = 0.03
RISK = "rouge_l_drop"


def calibrated(bench: Bench, chosen_on: Sequence[Example]) -> dict[str, Any]:
    """By format, thresholds and what they lose on `bench.photographs`."""
    kept = kept_answers(bench)
    runtimes = {layers: in_llama(bench, layers, kept) for layers in FORMATS}
    halves = (chosen_on, bench.photographs)
    return by_format(bench.adapter, bench.encoder, halves, in_torch(bench, kept), runtimes)


def by_format(
    adapter: Adapter,
    encoder: InputProcessor,
    halves: tuple[Sequence[Example], Sequence[Example]],
    float32: KeptRuntime,
    runtimes: Mapping[str, KeptRuntime],
) -> dict[str, Any]:
    """By format, thresholds that were chosen on the first half, and what they lose on the other."""
    whole = [cider(float32.answers(encoder, h, FULL, **LONGEST), h) for h in halves]
    return {
        "target": TARGET,
        "risk": RISK,
        "chosen_on": len(halves[0]),
        "measured_on": len(halves[1]),
        "formats": {
            layers: _Format(adapter, encoder, runtime, halves, whole).found()
            for layers, runtime in tqdm(runtimes.items(), "calibrated", disable=None)
        },
    }


class _Format:
    """One format's answers. whole: CIDEr of the float32 full model, on both halves."""

    def __init__(
        self,
        adapter: Adapter,
        encoder: InputProcessor,
        runtime: KeptRuntime,
        halves: tuple[Sequence[Example], Sequence[Example]],
        whole: Sequence[Measure],
    ) -> None:
        self._adapter, self._encoder, self._runtime = adapter, encoder, runtime
        (self._chosen_on, self._measured_on), self._whole = halves, whole

    def found(self) -> dict[str, Any]:
        [depth] = self._adapter.policy.thresholds
        tried = {t: self._drop({depth: t}) for t in reversed(THRESHOLDS)}
        fitting = next(({depth: t} for t, drop in tried.items() if drop <= TARGET), {})
        found = calibrate(
            self._adapter, self._encoder, self._chosen_on, self._policy({}),
            target=TARGET, risk=RISK, thresholds=THRESHOLDS, runtime=self._runtime,
            candidates=len(FORMATS), **LONGEST,  # all on the same photographs
        )  # fmt: skip
        evidence = ("measured", "bound", "confidence", "n", "reason")
        return {
            "calibrated": {
                "drops_tried": {str(t): drop for t, drop in tried.items()},
                **self._measured(fitting),
            },
            "guaranteed": {
                **{name: getattr(found, name) for name in evidence},
                **self._measured(found.policy.thresholds),
            },
        }

    def _policy(self, thresholds: Mapping[int, float]) -> ExitPolicy:
        return replace(self._adapter.policy, thresholds=thresholds)

    def _answers(self, half: Sequence[Example], thresholds: Mapping[int, float]) -> Any:
        policy = self._policy(thresholds) if thresholds else FULL
        return self._runtime.answers(self._encoder, half, policy, **LONGEST)

    def _drop(self, thresholds: Mapping[int, float]) -> float:
        """Of CIDEr on the choosing half."""
        said = self._answers(self._chosen_on, thresholds)
        return 1 - cider(said, self._chosen_on).value / self._whole[0].value

    def _measured(self, thresholds: Mapping[int, float]) -> dict[str, Any]:
        """On the measuring half: CIDEr against the float32 full model, and the risk against the
        full model of the format."""
        half = self._measured_on
        said, full = self._answers(half, thresholds), self._answers(half, {})
        return {
            "thresholds": {str(d): t for d, t in thresholds.items()},
            **worth(cider(said, half), self._whole[1]),
            "risk": float(RISKS[RISK].losses(said, full, half).mean()),
        }
