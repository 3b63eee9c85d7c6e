"""How good each answer is against its references: one registry of qualities by name.

Evaluation, calibrated risks, analysis and comparison all look a name up here, so that it means the
same in each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from offramp.evaluation.caption_metrics import caption_scores
from offramp.evaluation.metrics import exact_match, vqa_accuracy
from offramp.evaluation.statistics import Array

AnswerQuality = Callable[[Sequence[str], Sequence[Sequence[str]]], Array]
"""The quality [n], at least 0, of answers [n] against the references of each."""


def _by_answer(judge: Callable[[str, Sequence[str]], float]) -> AnswerQuality:
    return lambda answers, references: np.array(
        [judge(answer, right) for answer, right in zip(answers, references, strict=True)]
    )


def _caption_metric(
    name: str, answers: Sequence[str], references: Sequence[Sequence[str]]
) -> Array:
    """A caption metric as pycocoevalcap has it, the same with Java and without."""
    scored = caption_scores(
        {str(i): answer for i, answer in enumerate(answers)},
        {str(i): right for i, right in enumerate(references)},
        metrics=(name,),
        tokenizer="simple",
    )
    return np.array(scored.by_example[name])


ANSWER_QUALITIES: dict[str, AnswerQuality] = {
    "exact_match": _by_answer(exact_match),
    "exact_match_normalised": _by_answer(partial(exact_match, normalise=True)),
    "vqa_accuracy": _by_answer(vqa_accuracy),
    "rouge_l": partial(_caption_metric, "ROUGE_L"),
    "cider": partial(_caption_metric, "CIDEr"),
}
"""In [0, 1], but "cider", in [0, 10]. "rouge_l": the F score (Lin 2004). "cider": CIDEr-D (Vedantam
et al. 2015), words weighted by these references."""
