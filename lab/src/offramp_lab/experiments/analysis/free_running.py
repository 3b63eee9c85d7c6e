"""Whole answers, decoded with every token exiting at one depth or by a policy, and judged.

Teacher-forced figures are too good: in its own answer an exit also has to live with its own
mistakes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from offramp.adapter import Adapter
from offramp.answers import Answer, generate_answers
from offramp.calibration.replay import Array
from offramp.calibration.risk_functions import QUALITIES, Quality
from offramp.data.example import Example
from offramp.engine.policy import FULL, ExitPolicy
from offramp.errors import check_known
from offramp.evaluation.statistics import Bootstrap
from offramp.models.exits import ExitSet
from offramp.models.input_processor import InputProcessor
from offramp_lab.experiments.analysis.depth_curves import dip

_LONG = 5  # words

METRICS = tuple(name for name in QUALITIES if name != "cider")
"""Qualities that are shares, in [0, 1]."""


def metric_for(examples: Sequence[Example], name: str | None) -> tuple[str, Quality]:
    """The metric `name`; None: rouge_l where answers have more than five words on average, else
    exact_match_normalised. Raise `InputError` if it is not known.
    """
    check_known("Metric", [name] if name else [], METRICS)
    words = [len(answer.split()) for e in examples for answer in e.answers]
    long = bool(words) and sum(words) / len(words) > _LONG
    name = name or ("rouge_l" if long else "exact_match_normalised")
    return name, QUALITIES[name]


@dataclass(frozen=True)
class FreeRunning:
    """The examples with the full model's answers, to compare others with.

    quality: judges answers to the examples that have references. options: of `generate_answers`.
    forced: the policy by which every token exits at one depth; its thresholds are set here.
    """

    encoder: InputProcessor
    examples: Sequence[Example]
    full: Sequence[Answer]
    quality: Quality
    draws: Callable[[Sequence[Example]], Bootstrap]
    options: Mapping[str, Any]
    forced: ExitPolicy = FULL
    labelled: Sequence[Example] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "labelled", [e for e in self.examples if e.answers])

    def decode(self, adapter: Adapter, policy: ExitPolicy) -> list[Answer]:
        """The answers to all examples by a policy."""
        return generate_answers(adapter, self.encoder, self.examples, policy, **self.options)

    def curves(self, exits: ExitSet, depths: Sequence[int]) -> dict[str, Any]:
        """`identical` and, with references, `quality` by depth, the full depth last."""
        # A threshold of 0: every token exits, the first one too where the prompt allows it.
        adapter = Adapter(self.encoder.backbone, exits)
        answers: dict[int, Sequence[Answer]] = {
            d: self.decode(adapter, replace(self.forced, thresholds={d: 0.0})) for d in depths
        }
        answers[self.encoder.backbone.depth] = self.full
        curves = {}
        measures = [("identical", self.identical, self.examples)]
        if self.labelled:
            measures.append(("quality", self.judged, self.labelled))
        for name, measure, examples in measures:
            draws = self.draws(examples)
            values = np.stack([measure(decoded) for decoded in answers.values()], 1)
            curves[name] = {
                "depths": list(answers),
                "values": [draws.mean(column) for column in values.T],
                "dip": dip(list(answers), values, np.ones(len(values)), draws),
            }
        return curves

    def by_policy(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """What a policy's answers keep of the full model's, and what they are worth."""
        depths = [depth for answer in answers for depth in answer.depths]
        figures: dict[str, Any] = {
            "mean_depth": float(np.mean(depths)),
            "identical": self.draws(self.examples).mean(self.identical(answers)),
        }
        if self.labelled:
            draws, early = self.draws(self.labelled), self.judged(answers)
            figures["quality"] = draws.mean(early)
            figures["difference"] = draws.mean(early, self.judged(self.full))
        return figures

    def against_full(self, answers: Sequence[Answer], subset: Array) -> dict[str, Any]:
        """Labelled answers that are better and worse than the full model's.

        subset: labelled examples [N] whose quality is also given by itself.
        """
        early, full = self.judged(answers), self.judged(self.full)
        draws = self.draws(self.labelled)
        within = draws.within(subset)
        return {
            "n": len(full),
            "better": int((early > full).sum()),
            "worse": int((early < full).sum()),
            "difference": draws.mean(early, full),
            "with_overthought_tokens": {
                "n": int(subset.sum()),
                "policy": within.mean(early[subset]),
                "full": within.mean(full[subset]),
            },
        }

    def identical(self, answers: Sequence[Answer]) -> Array:
        """Which answers [N] are the full model's, as 1 and 0."""
        return np.array([float(a.ids == b.ids) for a, b in zip(answers, self.full, strict=True)])

    def judged(self, answers: Sequence[Answer]) -> Array:
        """Quality [N] of the answers to labelled examples."""
        asked = [a for a, e in zip(answers, self.examples, strict=True) if e.answers]
        return np.asarray(self.quality(asked, self.labelled), dtype=np.float64)
