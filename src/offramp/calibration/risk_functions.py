"""What early answers lose against the full model's: the risks that can be guaranteed, and answers.

A risk with labels is a drop of quality, of whole free-running answers: below 0 where exiting early
gives the better answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from offramp.core.inputs.example import Example
from offramp.data.item import Item
from offramp.evaluation.answer_quality import ANSWER_QUALITIES
from offramp.evaluation.caption_metrics import Frequencies, simple_words

if TYPE_CHECKING:
    from offramp.adapter.answers import Answer  # which loads PyTorch; the names of risks need none

Array = npt.NDArray[Any]

Losses = Callable[[Sequence["Answer"], Sequence["Answer"], Sequence[Example]], Array]
"""What each early answer loses [n] against the full model's answer to the same example."""

Quality = Callable[[Sequence["Answer"], Sequence[Example]], Array]
"""How good each answer is [n], at least 0."""


@dataclass(frozen=True)
class Risk:
    """A loss of early answers against the full model's, in [low, 1].

    quality: of a risk with labels, what drops. whole: whether a loss is -1, 0 or 1, never between.
    weighed: the same risk, with words weighed by the references of other images, which every loss
        needs that is to be of its own image alone; None: no words are weighed.
    """

    losses: Losses
    low: float = 0.0
    quality: Quality | None = None
    whole: bool = False
    weighed: Callable[[Sequence[Example]], Risk] | None = None


@dataclass(frozen=True)
class Judged(Example):
    """An example with what its answer is compared with, where that is more than its answers: of
    ten that people gave, the blank ones count too."""

    references: tuple[str, ...] = ()

    @classmethod
    def of(cls, item: Item | Example) -> Example:
        """Return an item as an example, and an example unchanged."""
        if isinstance(item, Example):
            return item
        return cls(**vars(item.example), references=item.references)


def _references(example: Example) -> Sequence[str]:
    return example.references if isinstance(example, Judged) else example.answers


def _differs(early: Sequence[Answer], full: Sequence[Answer], _: Sequence[Example]) -> Array:
    return np.array([float(a.ids != b.ids) for a, b in zip(early, full, strict=True)])


def _inconsistency(early: Sequence[Answer], full: Sequence[Answer], _: Sequence[Example]) -> Array:
    losses = np.array([float(a.text != b.text) for a, b in zip(early, full, strict=True)])
    # Nothing is like an answer without a word.
    answered = [i for i in np.flatnonzero(losses).tolist() if simple_words(full[i].text)]
    if answered:
        texts, references = [early[i].text for i in answered], [[full[i].text] for i in answered]
        losses[answered] = 1 - ANSWER_QUALITIES["rouge_l"](texts, references)
    return losses


def _quality(name: str) -> Quality:
    judge = ANSWER_QUALITIES[name]
    return lambda answers, examples: judge(
        [answer.text for answer in answers], list(map(_references, examples))
    )


QUALITIES: dict[str, Quality] = {name: _quality(name) for name in ANSWER_QUALITIES}
"""Qualities of whole answers against the data's."""


def _drop(quality: Quality, **more: Any) -> Risk:
    def losses(
        early: Sequence[Answer], full: Sequence[Answer], examples: Sequence[Example]
    ) -> Array:
        return quality(full, examples) - quality(early, examples)

    return Risk(losses, -1.0, quality, **more)


CIDER_CAP = 2.5
"""What a right answer of one word scores; a caption that scores more counts no higher."""


def _capped(scores: Array) -> Array:
    return np.minimum(scores, CIDER_CAP) / CIDER_CAP


def _cider_weighed(others: Sequence[Example]) -> Risk:
    frequencies = Frequencies.of(list(map(_references, others)))
    return _drop(
        lambda answers, examples: _capped(
            frequencies.cider([a.text for a in answers], list(map(_references, examples)))
        )
    )


BOUNDED = ("exact_match", "vqa_accuracy", "rouge_l")
"""Qualities whose drop is a risk: what one answer can lose is at most 1."""

RISKS: dict[str, Risk] = {
    "disagreement": Risk(_differs, whole=True),
    "consistency": Risk(_inconsistency),
    **{f"{name}_drop": _drop(QUALITIES[name], whole=name == "exact_match") for name in BOUNDED},
    "cider_drop": _drop(
        lambda answers, examples: _capped(QUALITIES["cider"](answers, examples)),
        weighed=_cider_weighed,
    ),
}
"""Risks by name. "disagreement": the share of answers that differ from the full model's;
"consistency": 1 - ROUGE-L F against the full model's answer; both need no labels. Drops: the
quality against the example's answers that is lost, below 0 where an early answer is the better.
"cider_drop": of CIDEr-D up to `CIDER_CAP`, as a share of it."""
