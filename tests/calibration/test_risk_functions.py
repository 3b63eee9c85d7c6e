"""Laws of the qualities that risks are of."""

from __future__ import annotations

import fakes
import pytest

from offramp.answers import Answer
from offramp.calibration.risk_functions import QUALITIES
from offramp.data.example import Example
from offramp.evaluation.caption_metrics import caption_scores


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
