"""Laws of the qualities that risks are of."""

from __future__ import annotations

import fakes
import pytest

from offramp.adapter.answers import Answer
from offramp.calibration.risk_functions import CAPTION_CAP, CIDER_CAP, QUALITIES, RISKS, Risk
from offramp.core.errors import DataError
from offramp.evaluation.caption_metrics import Frequencies, caption_scores
from offramp.inputs.example import Example

OTHERS = (
    ("a dog runs on grass", "the dog is on the grass"),
    ("two men on a bus", "men ride a red bus"),
    ("a cat sleeps", "a cat on a bed"),
)
"""References of images that are not scored."""


def asked(*references: tuple[str, ...]) -> list[Example]:
    picture = fakes.examples(1)[0].image
    return [Example(picture, "", some, key=str(i)) for i, some in enumerate(references)]


def weighed() -> Risk:
    risk = RISKS["cider_drop"]
    assert risk.weighed is not None
    return risk.weighed(asked(*OTHERS))


def lost(early: list[str], full: list[str], examples: list[Example]) -> list[float]:
    answers = ([Answer((), text) for text in texts] for texts in (early, full))
    return [*map(float, weighed().losses(*answers, examples))]


def test_cider_of_single_captions_has_the_corpus_score_as_its_mean() -> None:
    said = ["a dog runs on grass", "two men ride a red bus", "a dog"]
    references = [
        ("a dog runs", "the dog is on the grass"),
        ("two men on a bus", "men ride a bus"),
        ("a cat sleeps", "a cat on a bed"),
    ]
    picture = fakes.examples(1)[0].image
    examples = [Example(picture, "", some, key=str(i)) for i, some in enumerate(references)]
    each = QUALITIES["cider"]([Answer((), text) for text in said], examples)
    keyed = {str(i): text for i, text in enumerate(said)}
    right = {str(i): some for i, some in enumerate(references)}
    whole = caption_scores(keyed, right, metrics=("CIDEr",), tokenizer="simple")
    assert each.mean() == pytest.approx(whole.measures["CIDEr"].value)
    assert each[0] > each[2]


def test_what_an_image_loses_of_cider_does_not_depend_on_the_others() -> None:
    examples = asked(("a dog runs on the grass",), ("men on a bus",), ("a bed",))
    early, full = ["a dog on grass", "a cat", "a bed"], ["a dog runs", "men on a bus", "a cat"]
    alone = [lost([e], [f], [x])[0] for e, f, x in zip(early, full, examples, strict=True)]
    assert lost(early, full, examples) == pytest.approx(alone)
    assert alone[1] > 0 > alone[2]


def test_a_right_word_is_the_most_that_cider_can_lose_and_half_as_much_of_a_caption() -> None:
    right = asked(("bed",))
    assert lost(["bus"], ["bed"], right) == [1]
    assert lost(["bed"], ["bus"], right) == [-1]
    (caption,) = asked(("a dog runs on grass",))
    assert Frequencies.of(OTHERS).cider(["a dog runs on grass"], [caption.answers])[0] > CIDER_CAP
    assert lost([""], ["a dog runs on grass"], [caption]) == [CAPTION_CAP / CIDER_CAP]
    most = RISKS["cider_drop"].most
    assert (most([caption]), most([caption, *right])) == (CAPTION_CAP / CIDER_CAP, 1)


def test_words_are_weighed_by_two_images_at_least() -> None:
    with pytest.raises(DataError, match="references of 1 images"):
        Frequencies.of(OTHERS[:1])
