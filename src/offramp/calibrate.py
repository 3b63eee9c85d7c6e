"""Thresholds with a promise: at most a stated share of answers differs from the full model's.

Learn-then-Test (Angelopoulos et al. 2021) with fixed-sequence testing: thresholds are tried from
the safest down, each with a valid p-value for "the risk is above the target", and the first that
cannot be rejected ends the search. The last that passed is returned. No label is needed, and no
assumption that risk grows as the threshold falls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from offramp.adapter import Adapter
from offramp.encode import Encoder
from offramp.errors import InputError
from offramp.examples import Example
from offramp.policy import FULL, Generation, Policy

GRID = (0.999, 0.995, 0.99, 0.98, 0.97, 0.95, 0.92, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)


@dataclass(frozen=True)
class Calibration:
    """What was promised, and on what evidence.

    policy: thresholds that passed; without thresholds if nothing could be promised.
    risk: share of answers that differ from the full model's, measured on the n examples.
    needed: with no mistake at all, this many examples would be the least to promise the target.
    """

    policy: Policy
    target: float
    confidence: float
    risk: float
    n: int
    needed: int


def hoeffding_bentkus(risk: float, n: int, target: float) -> float:
    """P-value of "the true risk is above `target`" for a mean of n losses in [0, 1].

    The smaller of Hoeffding's and Bentkus's bounds (Bates et al. 2021, section 3.1).
    """
    from scipy.stats import binom

    if risk >= target:
        return 1.0
    divergence = (1 - risk) * math.log((1 - risk) / (1 - target))
    if risk > 0:
        divergence += risk * math.log(risk / target)
    bentkus = math.e * float(binom.cdf(math.ceil(n * risk), n, target))
    return min(1.0, math.exp(-n * divergence), bentkus)


def calibrate(
    adapter: Adapter,
    encoder: Encoder,
    examples: Sequence[Example],
    policy: Policy,
    *,
    target: float = 0.01,
    confidence: float = 0.95,
    thresholds: Sequence[float] = GRID,
    batch_size: int = 32,
    progress: Any = iter,
    **options: Any,
) -> Calibration:
    """The lowest threshold that keeps P(risk <= target) >= confidence, one for all the exits.

    policy: what to calibrate; its own thresholds are ignored, its score and KV policy are kept.
    examples: drawn like those to come, and never trained on.
    """
    if not (0 < target < 1 and 0 < confidence < 1):
        raise InputError(
            f"Target {target} and confidence {confidence} must lie between 0 and 1.",
            "For example target 0.01 (1% of answers may differ) and confidence 0.95.",
        )
    full = _answers(adapter, encoder, examples, FULL, batch_size, options)
    n = len(full)
    needed = math.ceil(math.log(1 - confidence) / math.log(1 - target))
    passed, risk = replace(policy, thresholds={}), 0.0
    for threshold in progress(sorted(thresholds, reverse=True)):
        tried = replace(policy, thresholds=dict.fromkeys(adapter.exits.depths, threshold))
        answers = _answers(adapter, encoder, examples, tried, batch_size, options)
        differ = sum(a != b for a, b in zip(answers, full, strict=True)) / n
        if hoeffding_bentkus(differ, n, target) > 1 - confidence:
            break
        passed, risk = tried, differ
    return Calibration(passed, target, confidence, risk, n, needed)


def _answers(
    adapter: Adapter,
    encoder: Encoder,
    examples: Sequence[Example],
    policy: Policy,
    batch_size: int,
    options: dict[str, Any],
) -> list[tuple[int, ...]]:
    """Token ids of each example's free-running answer."""
    found: list[tuple[int, ...]] = []
    for start in range(0, len(examples), batch_size):
        inputs = encoder.prompts(examples[start : start + batch_size])
        result = adapter.generate(inputs, policy=policy, **{"do_sample": False, **options})
        found += answer_ids(result)
    return found


def answer_ids(result: Generation) -> list[tuple[int, ...]]:
    """The generated ids of each row, padding removed."""
    rows: Tensor = result.new_tokens
    live = result.depths > 0
    return [tuple(row[keep].tolist()) for row, keep in zip(rows, live, strict=True)]
