"""Answers of the full model are written once: not again by a run that goes on, nor by another one
in the same folder; and anew wherever they could be others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fakes
import pytest
import training_runs

import offramp.adapter.answers
from offramp.adapter.answers import KeptAnswers, full_model_answers
from offramp.features.input_processor import InputProcessor
from offramp.training.trainer import train

NAME = "blip2-opt"


@pytest.fixture
def encoder(opt: Any) -> InputProcessor:
    return InputProcessor(opt, fakes.Blip2FakeProcessor(NAME))


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call that generates."""
    rows: list[int] = []
    generate = offramp.adapter.answers.generate_by

    def noted(model: Any, inputs: Any, *rest: Any) -> Any:
        rows.append(len(inputs["input_ids"]))
        return generate(model, inputs, *rest)

    monkeypatch.setattr(offramp.adapter.answers, "generate_by", noted)
    return rows


def written(encoder: InputProcessor, kept: KeptAnswers | None, new: int = 5, first: int = 0) -> Any:
    examples = fakes.examples(first + 6)[first:]
    rows = full_model_answers(encoder, examples, batch_size=2, max_new_tokens=new, kept=kept)
    return [row.ids for row in rows]


def test_what_is_kept_is_what_was_written(
    encoder: InputProcessor, generated: list[int], tmp_path: Path
) -> None:
    plain = written(encoder, None)
    first = written(encoder, KeptAnswers(tmp_path / "kept.jsonl", "it"))
    again = written(encoder, KeptAnswers(tmp_path / "kept.jsonl", "it"))
    assert plain == first == again and generated == [2] * 6


def test_a_run_that_was_cut_off_writes_the_rest(
    encoder: InputProcessor, generated: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = offramp.adapter.answers.generate_by

    def cut_off(*asked: Any) -> Any:
        if len(generated) == 2:
            raise KeyboardInterrupt
        return noted(*asked)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(offramp.adapter.answers, "generate_by", cut_off)
        written(encoder, KeptAnswers(tmp_path / "kept.jsonl", "it"))
    whole = written(encoder, KeptAnswers(tmp_path / "kept.jsonl", "it"))
    assert generated == [2] * 3 and whole == written(encoder, None)


@pytest.mark.parametrize("other", ["length", "prompts", "backbone"])
def test_other_questions_are_answered_anew(
    other: str, encoder: InputProcessor, generated: list[int], tmp_path: Path
) -> None:
    written(encoder, KeptAnswers(tmp_path / "kept.jsonl", "it"))
    kept = KeptAnswers(tmp_path / "kept.jsonl", "another" if other == "backbone" else "it")
    asked = {"length": {"new": 4}, "prompts": {"first": 6}}.get(other, {})
    made = written(encoder, kept, **asked)
    assert generated == [2] * 6 and made == written(encoder, None, **asked)


def test_a_damaged_file_is_begun_anew(
    encoder: InputProcessor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "kept.jsonl"
    file.write_text("no JSON\n")
    assert written(encoder, KeptAnswers(file, "it")) == written(encoder, None)
    assert "written again" in caplog.text
    assert KeptAnswers(file, "it").found


def test_a_run_with_other_settings_finds_them(
    opt: Any, generated: list[int], tmp_path: Path
) -> None:
    processor = fakes.Blip2FakeProcessor(NAME)
    for steps, overwrite in ((4, False), (6, True)):
        config = training_runs.replace(training_runs.SHORT, steps=steps)
        train(opt, processor, fakes.examples(12), config, tmp_path, overwrite=overwrite)
        if steps == 4:
            first = len(generated)
    assert first and len(generated) == first
