"""What an analysis measures, and how; the command's flags and their help come from here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offramp.calibration.risk_functions import QUALITIES, Quality
from offramp.data.example import Example, picture_of
from offramp.errors import InputError, check_known
from offramp.options import option
from offramp_lab.experiments.statistics import Bootstrap

METRICS = tuple(name for name in QUALITIES if name != "cider")
"""Qualities that are shares, in [0, 1]."""
_LONG = 5  # words


@dataclass(frozen=True)
class AnalysisConfig:
    """What is measured and how."""

    metric: str | None = option(
        None,
        "quality of answers",
        choices=METRICS,
        shown="rouge_l for answers of more than five words, else exact_match_normalised",
    )
    decode_depths: tuple[int, ...] | None = option(
        None, "decode with every token exiting at these", shown="all, or twelve spread evenly"
    )
    exit_in_prefill: bool | None = option(
        None,
        "let first tokens exit early too, where the prompt is causal",
        shown="as the adapter's policy has it; where a depth is forced they do",
    )
    max_new_tokens: int = option(40, "longest answer")
    batch_size: int = option(32, "examples at once; changes memory and time, not results")
    confidence: float = option(0.95, "of the bootstrap's intervals")
    resamples: int = option(1000, "of the bootstrap")
    seed: int = option(0, "of the bootstrap")

    def __post_init__(self) -> None:
        counts = ("max_new_tokens", "batch_size", "resamples")
        wrong = [f"{n} is {getattr(self, n)}" for n in counts if getattr(self, n) < 1]
        if not 0 < self.confidence < 1:
            wrong.append(f"confidence is {self.confidence}")
        if wrong:
            raise InputError(
                f"This analysis cannot start: {'; '.join(wrong)}.",
                "Give counts of 1 or more, and a confidence between 0 and 1.",
            )

    def draws(self, examples: Sequence[Example]) -> Bootstrap:
        """Intervals over the images of examples."""
        images = list(map(picture_of, examples))
        return Bootstrap(images, self.confidence, self.resamples, self.seed)


DEFAULT = AnalysisConfig()


def metric_for(examples: Sequence[Example], name: str | None) -> tuple[str, Quality]:
    """The metric `name`; None: rouge_l where answers have more than five words on average, else
    exact_match_normalised. Raise `InputError` if it is not known.
    """
    check_known("Metric", [name] if name else [], METRICS)
    words = [len(answer.split()) for e in examples for answer in e.answers]
    long = bool(words) and sum(words) / len(words) > _LONG
    name = name or ("rouge_l" if long else "exact_match_normalised")
    return name, QUALITIES[name]
