"""What early answers lose against the full model's: the risks that can be guaranteed, and answers.

A risk with labels is a drop of quality, of whole free-running answers: below 0 where exiting early
gives the better answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.answers import Answer
from offramp.data.example import Example
from offramp.evaluation.caption_metrics import caption_scores
from offramp.evaluation.metrics import exact_match, vqa_accuracy

Array = npt.NDArray[Any]


Losses = Callable[[Sequence[Answer], Sequence[Answer], Sequence[Example]], Array]
"""What each early answer loses [n] against the full model's answer to the same example."""

Quality = Callable[[Sequence[Answer], Sequence[Example]], Array]
"""How good each answer is [n], at least 0."""


@dataclass(frozen=True)
class Risk:
    """A loss of early answers against the full model's, in [low, 1].

    quality: of a risk with labels, what drops.
    """

    losses: Losses
    low: float = 0.0
    quality: Quality | None = None


def _differs(early: Sequence[Answer], full: Sequence[Answer], _: Sequence[Example]) -> Array:
    return np.array([float(a.ids != b.ids) for a, b in zip(early, full, strict=True)])


def _scored(metric: str, answers: Sequence[Answer], references: Sequence[Sequence[str]]) -> Array:
    """A caption metric [n] as pycocoevalcap has it, the same with Java and without."""
    texts = {str(i): answer.text for i, answer in enumerate(answers)}
    right = {str(i): some for i, some in enumerate(references)}
    scored = caption_scores(texts, right, metrics=(metric,), tokenizer="simple")
    return np.array(scored.each[metric])


def _rouge_l(answers: Sequence[Answer], references: Sequence[Sequence[str]]) -> Array:
    """ROUGE-L F [n] (Lin 2004)."""
    return _scored("ROUGE_L", answers, references)


def cider(answers: Sequence[Answer], examples: Sequence[Example]) -> Array:
    """CIDEr-D [n] in [0, 10] (Vedantam et al. 2015), words weighted by these examples' captions.

    It is no risk: what one answer loses by it has no bound that would be of use.
    """
    return _scored("CIDEr", answers, [example.answers for example in examples])


def _inconsistency(early: Sequence[Answer], full: Sequence[Answer], _: Sequence[Example]) -> Array:
    losses = np.array([float(a.text != b.text) for a, b in zip(early, full, strict=True)])
    # Nothing is like an empty answer.
    some = [i for i in np.flatnonzero(losses).tolist() if full[i].text]
    if some:
        losses[some] = 1 - _rouge_l([early[i] for i in some], [[full[i].text] for i in some])
    return losses


def _drop(quality: Quality) -> Risk:
    def losses(
        early: Sequence[Answer], full: Sequence[Answer], examples: Sequence[Example]
    ) -> Array:
        return quality(full, examples) - quality(early, examples)

    return Risk(losses, -1.0, quality)


def _judged(judge: Callable[[str, Sequence[str]], float]) -> Quality:
    return lambda answers, examples: np.array(
        [judge(a.text, e.answers) for a, e in zip(answers, examples, strict=True)]
    )


RISKS: dict[str, Risk] = {
    "disagreement": Risk(_differs),
    "consistency": Risk(_inconsistency),
    "exact_match_drop": _drop(_judged(exact_match)),
    "vqa_accuracy_drop": _drop(_judged(vqa_accuracy)),
    "rouge_l_drop": _drop(lambda given, examples: _rouge_l(given, [e.answers for e in examples])),
}
"""Risks by name. "disagreement": the share of answers that differ from the full model's;
"consistency": 1 - ROUGE-L F against the full model's answer; both need no labels. Drops: the
quality against the example's answers that is lost, below 0 where an early answer is the better."""
