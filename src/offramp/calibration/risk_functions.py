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

from offramp.data.item import Item
from offramp.evaluation.answer_quality import ANSWER_QUALITIES
from offramp.evaluation.caption_metrics import Frequencies, simple_words
from offramp.inputs.example import Example

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

    quality: for a risk with labels, the score that drops. whole: whether every loss is -1, 0 or 1.
    weighed: returns the same risk with words weighed by references of other images, so that each
    loss depends on its own image alone; None: no words are weighed. most: returns the largest
    possible loss for some examples, which bounds their tests.
    """

    losses: Losses
    low: float = 0.0
    quality: Quality | None = None
    whole: bool = False
    weighed: Callable[[Sequence[Example]], Risk] | None = None
    most: Callable[[Sequence[Example]], float] = lambda examples: 1.0


@dataclass(frozen=True)
class Judged(Example):
    """An example with the references that its answer is judged by, if these are more than its
    answers: of ten answers by people, the blank ones count too."""

    references: tuple[str, ...] = ()

    @classmethod
    def of(cls, item: Item | Example) -> Example:
        """Return an item as an example; an example stays unchanged."""
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
"""What a right answer of one word scores, of one n-gram order of four; an answer that scores more
counts no higher."""
CAPTION_CAP = 1.25
"""The same of captions, about what people's score against each other: half the range that a test
has to allow for."""
CAPTION = 4
"""Words from which on a reference is a caption: it has n-grams of all orders."""


def _caps(examples: Sequence[Example]) -> Array:
    """The most that an answer to each example counts [n], by the mean length of its references."""
    words = [[len(simple_words(text)) for text in _references(each)] for each in examples]
    return np.where([np.mean(some) >= CAPTION for some in words], CAPTION_CAP, CIDER_CAP)


def _cider(score: Callable[[Sequence[str], Sequence[Sequence[str]]], Array], **more: Any) -> Risk:
    """The drop of capped CIDEr-D as a share of `CIDER_CAP`. score: of texts, by references."""

    def capped(answers: Sequence[Answer], examples: Sequence[Example]) -> Array:
        scores = score([a.text for a in answers], list(map(_references, examples)))
        return np.minimum(scores, _caps(examples)) / CIDER_CAP

    return _drop(
        capped, most=lambda examples: float(_caps(examples).max(initial=0)) / CIDER_CAP, **more
    )


def _cider_weighed(others: Sequence[Example]) -> Risk:
    return _cider(Frequencies.of(list(map(_references, others))).cider)


BOUNDED = ("exact_match", "vqa_accuracy", "rouge_l")
"""Qualities whose drop is a risk: what one answer can lose is at most 1."""

RISKS: dict[str, Risk] = {
    "disagreement": Risk(_differs, whole=True),
    "consistency": Risk(_inconsistency),
    **{f"{name}_drop": _drop(QUALITIES[name], whole=name == "exact_match") for name in BOUNDED},
    "cider_drop": _cider(ANSWER_QUALITIES["cider"], weighed=_cider_weighed),
}
"""Risks by name. "disagreement": the share of answers that differ from the full model's;
"consistency": 1 - ROUGE-L F against the full model's answer; both need no labels. Drops: the
quality against the example's answers that is lost, below 0 where an early answer is the better.
"cider_drop": of CIDEr-D up to `CIDER_CAP`, of captions up to `CAPTION_CAP`, as a share of
`CIDER_CAP`."""
