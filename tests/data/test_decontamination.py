"""Laws of seen images: none that training or calibration used comes back unnoticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fakes
import families
import pytest

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.errors import DataError
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits
from offramp.data.decontamination import check_no_overlap, picture_digests, unseen
from offramp.evaluation.evaluate import evaluate
from offramp.features.input_processor import InputProcessor
from offramp.inputs.example import Example
from offramp.training.config import TrainConfig
from offramp.training.trainer import train

ADVICE = "Take others."


@pytest.fixture(scope="module")
def encoder() -> InputProcessor:
    return InputProcessor(
        Backbone(families.build("blip2-opt")), fakes.Blip2FakeProcessor("blip2-opt")
    )


def test_a_picture_counts_once_under_its_first_question() -> None:
    picture = fakes.picture(3)
    some = [Example(picture, f"q{i}", (), f"e{i}") for i in range(3)]
    found = picture_digests([*some, Example(picture.copy(), "again", (), "copy")])
    assert list(found.values()) == ["e0"]


def test_a_picture_is_known_by_content_not_by_name(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        fakes.picture(3).save(tmp_path / name)
    seen = {"train": list(picture_digests([Example(tmp_path / "a.png", "", (), "a")]))}
    with pytest.raises(DataError, match=r"1 of 1 images were used in training.*'b'"):
        check_no_overlap(seen, [Example(tmp_path / "b.png", "", (), "b")], ("train",), ADVICE)


def test_what_comes_from_a_source_that_was_used_is_not_unseen() -> None:
    """Another page of the same document."""
    pages = [
        Example(fakes.picture(i), "", (), f"{i}", source=f"document {i // 2}") for i in range(4)
    ]
    seen = {"train": list(picture_digests(pages[:1]))}
    assert unseen(seen, pages, ("train",)) == [False, False, True, True]
    assert unseen(seen, pages, ("calibration",)) == [True] * 4


@pytest.mark.parametrize("step", ["train", "calibration"])
def test_only_the_steps_that_are_asked_about_are_refused(step: str) -> None:
    some = fakes.examples(4)
    seen = {"train": [], step: list(picture_digests(some[:1]))}
    other = {"train": "calibration", "calibration": "train"}[step]
    check_no_overlap(seen, some, (other,), ADVICE)
    check_no_overlap(seen, some[1:], (step,), ADVICE)
    with pytest.raises(DataError, match=r"'e0'[^\n]*\nTake others"):
        check_no_overlap(seen, some, (step,), ADVICE)


def test_training_stores_all_its_pictures(encoder: InputProcessor, tmp_path: Path) -> None:
    some = fakes.examples(8)
    config = TrainConfig(exit_kind="layer", depths=(2,), steps=1, batch_size=4, max_new_tokens=3)
    adapter = train(encoder.backbone, encoder.processor, some, config, tmp_path / "exits")
    loaded = Adapter.load(tmp_path / "exits", encoder.backbone)
    assert set(adapter.seen["train"]) == set(loaded.seen["train"]) == set(picture_digests(some))


@pytest.mark.parametrize("step", ["train", "calibration"])
def test_evaluation_refuses_pictures_of_training_and_calibration_unless_told(
    encoder: InputProcessor, tmp_path: Path, step: str
) -> None:
    some = fakes.examples(3)
    adapter = Adapter(
        encoder.backbone,
        Exits(encoder.backbone, (2,)),
        ExitPolicy({2: 0.5}),
        seen={"train": [], step: list(picture_digests(some[:2]))},
    )
    run: dict[str, Any] = {"max_new_tokens": 2, "resamples": 10, "batch_size": 3}
    with pytest.raises(DataError, match="2 of 3 images"):
        evaluate(adapter, encoder, some, "gqa", out=tmp_path / "run", **run)
    assert not (tmp_path / "run").exists()
    told = evaluate(adapter, encoder, some, "gqa", out=tmp_path / "run", allow_seen=True, **run)
    alone = evaluate(adapter, encoder, some, "gqa", out=tmp_path / "full", mode="full", **run)
    assert told["n"] == alone["n"] == 3  # the full model has seen none of them
