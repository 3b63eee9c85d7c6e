"""Laws of verdicts: one answer, one sentence, whatever is known of it and wherever it is shown."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from offramp.adapter.shipped import load_tiny
from offramp.core.decoding.policy import FULL
from offramp.engines.loading import load
from offramp.features.input_processor import InputProcessor
from offramp.promises.guarantee import GuaranteeStatus, Promise
from offramp.promises.likeness import Likeness
from offramp.promises.verdict import BROKEN, EXACT, NONE, decide
from serving import scene_examples

PROMISE = Promise(
    "cider_drop",
    0.025,
    0.95,
    kinds=("Caption:", "Question: ... ? Answer:"),
    own_targets={"Question: ... ? Answer:": 0.15},
)
STANDS = GuaranteeStatus(PROMISE)


@pytest.mark.parametrize(
    ("given", "says", "why"),
    [
        ({}, "Promised: at most 0.0625 CIDEr-D lost.", "with 95% confidence"),
        ({"kind": "Question: ... ? Answer:"}, "Promised: at most 0.375 CIDEr-D lost.", "0.375"),
        ({"exact": True}, EXACT, ""),
        ({"exact": True, "broken": True}, EXACT, BROKEN),
        ({"broken": True}, NONE, BROKEN),
        ({"status": GuaranteeStatus()}, NONE, "not calibrated"),
        ({"status": GuaranteeStatus(why="on cuda where cpu was")}, NONE, "on cuda where cpu was"),
        ({"scores": [0.1]}, NONE, "unlike those calibrated (p = 0.0025)"),
    ],
)
def test_each_answer_has_one_verdict_in_about_five_words(
    given: dict[str, Any], says: str, why: str
) -> None:
    likeness = Likeness.of([[0.9]] * 400, ["Caption:"] * 400)
    known = {"status": STANDS, "kind": "Caption:", "likeness": likeness, "scores": [0.95], **given}
    found = decide(known.pop("status"), **known)
    assert found.says == says and why in found.why
    assert len(found.says.split()) <= 7
    assert found.to_json()["promised"] == says.startswith("Promised")
    assert found.sentence.startswith(says) and (not why or why in found.sentence)
    assert len(found.brief.split()) <= 15 and says[:-1] in found.brief


def test_a_promise_that_says_nothing_is_not_printed() -> None:
    kind = "Question: ... ? Answer:"
    worth = {"Caption:": 0.31, kind: 0.222}  # two thirds of the right answers might be lost
    status = GuaranteeStatus(Promise(**{**vars(PROMISE), "qualities": worth}))
    found = decide(status, kind=kind)
    assert found.says == NONE and "0.375 of 0.555 be lost, which says nothing" in found.why
    assert decide(status, kind="Caption:").promise is not None
    assert decide(GuaranteeStatus(Promise("disagreement", 0.6, 0.95))).promise is None


def test_what_was_not_tested_is_said() -> None:
    found = decide(
        STANDS,
        kind="Caption:",
        scores=[0.9],
        likeness=Likeness.of([[0.9]] * 73, ["Caption:"] * 73, np.zeros((73, 20))),
    )
    assert found.promise is not None and "likeness not tested (73 images)" in found.sentence


def test_an_answer_in_python_carries_its_verdict() -> None:
    model = load("tiny-opt", engine="torch", vision="torch")
    image, noise = scene_examples()[0].image, Image.effect_noise((72, 72), 90).convert("RGB")
    assert model.answer(image).verdict.says == "Promised: at most 0.75% differ."
    assert model.answer(image, mode="lossless").verdict.says == EXACT
    assert model.answer(image, mode="full").verdict.says == EXACT
    assert model.answer(image, "Write a poem.").verdict.says == NONE
    assert model.answer(noise).verdict.unlike
    assert model.answer(image, do_sample=True, temperature=2.0).verdict.says == NONE
    assert model.answer(image, max_new_tokens=90).verdict.says == NONE


def test_without_an_image_nothing_is_promised_of_a_model_that_was_calibrated_with_one() -> None:
    model = load("tiny-opt", engine="torch", vision="torch")
    backbone, processor = load_tiny("opt")
    made = model.adapter.generate(
        InputProcessor(backbone, processor).prompts(scene_examples()[:1]),
        max_new_tokens=4,
        do_sample=False,
    )
    found = model.adapter.verdict(made, model.processor, "Caption:", None)
    assert found.says == NONE and "a prompt unlike the calibrated ones" in found.why
    assert model.adapter.verdict(made, model.processor, "Caption:", None, policy=FULL).exact
