"""Whole answers, decoded with every token leaving at one depth or by a policy, and judged.

Teacher-forced figures flatter: in its own answer an exit also has to live with its own mistakes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from offramp.calibration.replay import Array
from offramp.data.example import Example
from offramp.engine.generate import generate
from offramp.engine.policy import ExitPolicy
from offramp.errors import check_known
from offramp.evaluation.caption_metrics import caption_scores
from offramp.evaluation.metrics import exact_match, vqa_accuracy
from offramp.models.exits import ExitSet
from offramp.models.input_processor import InputProcessor
from offramp.research.analysis.depth_curves import Bootstrap, dip

_LONG = 5  # words

Metric = Callable[[Sequence[str], Sequence[Example]], Sequence[float]]
"""The quality in [0, 1] of an answer to each example."""


def _each(one: Callable[[str, Sequence[str]], float]) -> Metric:
    return lambda texts, examples: [
        one(text, example.answers) for text, example in zip(texts, examples, strict=True)
    ]


def _rouge_l(texts: Sequence[str], examples: Sequence[Example]) -> Sequence[float]:
    answers = {str(i): text for i, text in enumerate(texts)}
    references = {str(i): example.answers for i, example in enumerate(examples)}
    scored = caption_scores(answers, references, metrics=("ROUGE_L",), tokenizer="simple")
    return scored.each["ROUGE_L"]


METRICS: dict[str, Metric] = {
    "exact_match": _each(lambda text, right: exact_match(text, right, normalise=True)),
    "vqa_accuracy": _each(vqa_accuracy),
    "rouge_l": _rouge_l,
}


def metric_for(examples: Sequence[Example], name: str | None) -> tuple[str, Metric]:
    """The metric `name`; None: rouge_l where answers have more than five words on average, else
    exact_match. Raise `InputError` if it is not known.
    """
    check_known("Metric", [name] if name else [], tuple(METRICS))
    words = [len(answer.split()) for e in examples for answer in e.answers]
    long = bool(words) and sum(words) / len(words) > _LONG
    name = name or ("rouge_l" if long else "exact_match")
    return name, METRICS[name]


@dataclass(frozen=True)
class FreeRunning:
    """The examples with the full model's answers `full` (ids), to compare others with.

    quality: judges answers to the examples that have references. options: of generation.
    """

    encoder: InputProcessor
    examples: Sequence[Example]
    full: Sequence[list[int]]
    quality: Metric
    draws: Callable[[Sequence[Example]], Bootstrap]
    batch_size: int
    progress: Any
    options: Mapping[str, Any]
    labelled: Sequence[Example] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "labelled", [e for e in self.examples if e.answers])

    def decode(self, exits: ExitSet, policy: ExitPolicy) -> tuple[list[list[int]], float]:
        """Greedy ids of every example, and the mean depth of their tokens."""
        found, depths = [], []
        for start in self.progress(range(0, len(self.examples), self.batch_size)):
            result = generate(
                self.encoder.backbone,
                self.encoder.prompts(self.examples[start : start + self.batch_size]),
                exits=exits,
                policy=policy,
                do_sample=False,
                num_beams=1,
                **self.options,
            )
            for ids, ran in zip(result.new_tokens, result.depths, strict=True):
                found.append(ids[ran > 0].tolist())
                depths += ran[ran > 0].tolist()
        return found, float(np.mean(depths))

    def curves(self, exits: ExitSet, depths: Sequence[int]) -> dict[str, Any]:
        """`identical` and, with references, `quality` by depth, the full depth last."""
        # A threshold of 0: every token leaves, the first one too where the prompt allows it.
        answers: dict[int, Sequence[list[int]]] = {
            d: self.decode(exits, ExitPolicy({d: 0.0}, exit_in_prefill=True))[0] for d in depths
        }
        answers[self.encoder.backbone.depth] = self.full
        found = {}
        measures = [("identical", self.identical, self.examples)]
        if self.labelled:
            measures.append(("quality", self.judged, self.labelled))
        for name, measure, examples in measures:
            draws = self.draws(examples)
            values = np.stack([measure(ids) for ids in answers.values()], 1)
            found[name] = {
                "depths": list(answers),
                "values": [draws.mean(column) for column in values.T],
                "dip": dip(list(answers), values, np.ones(len(values)), draws),
            }
        return found

    def by_policy(self, ids: Sequence[list[int]], mean_depth: float) -> dict[str, Any]:
        """What is kept of the full model's answers, and what the others are worth."""
        found = {
            "mean_depth": mean_depth,
            "identical": self.draws(self.examples).mean(self.identical(ids)),
        }
        if self.labelled:
            draws, early = self.draws(self.labelled), self.judged(ids)
            found["quality"] = draws.mean(early)
            found["difference"] = draws.mean(early, self.judged(self.full))
        return found

    def against_full(self, ids: Sequence[list[int]], subset: Array) -> dict[str, Any]:
        """Labelled answers that are better and worse than the full model's.

        subset: labelled examples [N] whose quality is also given by itself.
        """
        early, full, draws = self.judged(ids), self.judged(self.full), self.draws(self.labelled)
        some = draws.within(subset)
        return {
            "n": len(full),
            "better": int((early > full).sum()),
            "worse": int((early < full).sum()),
            "difference": draws.mean(early, full),
            "with_overthought_tokens": {
                "n": int(subset.sum()),
                "policy": some.mean(early[subset]),
                "full": some.mean(full[subset]),
            },
        }

    def identical(self, ids: Sequence[list[int]]) -> Array:
        """Which answers [N] are the full model's, as 1 and 0."""
        return np.array([float(a == b) for a, b in zip(ids, self.full, strict=True)])

    def judged(self, ids: Sequence[list[int]]) -> Array:
        """Quality [N] of the answers to labelled examples."""
        kept = [row for row, e in zip(ids, self.examples, strict=True) if e.answers]
        texts = self.encoder.tokenizer.batch_decode(kept, skip_special_tokens=True)
        return np.asarray(self.quality([t.strip() for t in texts], self.labelled), dtype=np.float64)
