"""Law 13: a user's mistake is two lines, what is wrong and what to do, and never a traceback; what
was on disk stays whole."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from adapters import content
from adapters import trained as trained_adapter
from command_line import TRAIN, RunCommand, assert_two_lines, write_rows
from safetensors import SafetensorError

from offramp.adapter.adapter import Adapter
from offramp.core.errors import StorageError
from offramp.core.save_and_load import CONFIG

# -- what stays whole ---------------------------------------------------------------------------


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def no_space_in_rust(*_: Any, **__: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device")


@pytest.mark.parametrize(
    ("where", "failure"),
    [
        ("safetensors.torch.save_file", no_space),
        ("safetensors.torch.save_file", no_space_in_rust),
        ("offramp.core.storage.os.fsync", no_space),
        ("pathlib.Path.write_text", no_space),
    ],
)
def test_a_full_disk_leaves_the_old_folder_as_it_was(
    where: str, failure: Any, saved_adapter: Path, opt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(saved_adapter)
    with monkeypatch.context() as full:
        full.setattr(where, failure)
        with pytest.raises(StorageError, match="No space left"):
            trained_adapter(opt).save(saved_adapter)
    assert content(saved_adapter) == before
    assert [p.name for p in saved_adapter.parent.iterdir()] == [saved_adapter.name]
    Adapter.load(saved_adapter, opt)


# -- the command line ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--task", "gqa"], "or give --backbone"),
        (["--task", "gqq", "--backbone", "tiny-opt"], "'gqa'"),
        (["--task", "vqa", "--backbone", "tiny-opt"], "ten people"),
        (["--task", "gqa", "--adapter", "nowhere"], "nowhere"),
        (["--task", "gqa", "--rescore"], "rows.jsonl"),
    ],
)
def test_a_mistake_in_what_to_evaluate_is_two_lines(
    run: RunCommand, questions: Path, tmp_path: Path, more: list[str], words: str
) -> None:
    found = run("eval", *more, "--data", questions, "--out", tmp_path / "run")
    assert_two_lines(found, words)


def test_a_race_of_no_rounds_is_refused(run: RunCommand, adapter: Path, photos: Path) -> None:
    arguments = (
        "calibrate",
        "--lossless",
        "--adapter",
        adapter,
        "--data",
        photos / "rows.jsonl",
        "--limit",
        0,
    )
    assert_two_lines(run(*arguments), "--limit", "from 1")


@pytest.mark.parametrize("command", ["train", "calibrate"])
def test_two_jsonl_files_are_refused_rather_than_one_left_out(
    run: RunCommand, command: str, adapter: Path, held_out: Path, unlabelled: Path, tmp_path: Path
) -> None:
    what = ("--backbone", "tiny-opt") if command == "train" else ("--adapter", adapter)
    assert_two_lines(
        run(command, *what, "--data", held_out, unlabelled, "--out", tmp_path), "2 files"
    )


def train_on(run: RunCommand, data: Path, out: Path, *more: Any) -> tuple[int, str, str]:
    return run("train", *TRAIN, "--data", data, "--out", out, *more)  # type: ignore[no-any-return]


def test_a_corrupt_image_is_named(run: RunCommand, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"not an image")
    data = write_rows(tmp_path / "rows.jsonl", [{"image": "bad.png", "captions": ["a"]}] * 2)
    assert_two_lines(train_on(run, data, tmp_path / "out"), "bad.png")


def test_a_truncated_image_is_named(run: RunCommand, photos: Path, tmp_path: Path) -> None:
    whole = (photos / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    data = write_rows(tmp_path / "rows.jsonl", [{"image": "cut.png", "captions": ["a"]}] * 2)
    assert_two_lines(train_on(run, data, tmp_path / "out"), "cut.png")


def test_a_missing_image_is_named(run: RunCommand, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"image": "gone.png", "captions": ["a"]}])
    assert_two_lines(train_on(run, data, tmp_path / "out"), "gone.png")


def test_a_missing_data_file_is_named(run: RunCommand, tmp_path: Path) -> None:
    assert_two_lines(train_on(run, tmp_path / "none.jsonl", tmp_path / "out"), "none.jsonl")


def test_a_row_without_an_answer_is_refused_where_labels_are_needed(
    run: RunCommand, photos: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"image": str(photos / "0.png")}])
    found = train_on(run, data, tmp_path / "out", "--regime", "supervised")
    assert_two_lines(found, "rows.jsonl", "1")


def test_an_empty_data_set_is_refused(run: RunCommand, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    assert_two_lines(train_on(run, tmp_path / "rows.jsonl", tmp_path / "out"), "rows.jsonl")


@pytest.mark.parametrize("depths", ["0", "12", "3,3", "99"])
def test_depths_that_do_not_fit_are_refused(
    run: RunCommand, photos: Path, tmp_path: Path, depths: str
) -> None:
    found = train_on(run, photos / "rows.jsonl", tmp_path / "out", "--depths", depths)
    assert_two_lines(found, "depth")


def test_a_training_option_out_of_range_is_refused(
    run: RunCommand, photos: Path, tmp_path: Path
) -> None:
    found = train_on(run, photos / "rows.jsonl", tmp_path / "out", "--learning-rate", 0)
    assert_two_lines(found, "learning_rate")


def generate_with(run: RunCommand, adapter: Path, photos: Path, *more: Any) -> tuple[int, str, str]:
    return run("generate", "--adapter", adapter, "--image", photos / "0.png", *more)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--risk", "disagrees", "disagreement"),
        ("--target", 1.5, "between 0 and 1"),
        ("--confidence", "nan", "between 0 and 1"),
        ("--score", "max_prob", "max_probability"),
    ],
)
def test_a_calibration_option_that_cannot_be_used_is_refused(
    run: RunCommand, trained: Path, held_out: Path, option: str, value: Any, words: str
) -> None:
    found = run("calibrate", "--adapter", trained, "--data", held_out, option, value)
    assert_two_lines(found, words)


@pytest.mark.slow
def test_calibrating_on_training_pictures_is_refused(
    run: RunCommand, trained: Path, photos: Path
) -> None:
    found = run("calibrate", "--adapter", trained, "--data", photos / "rows.jsonl")
    assert_two_lines(found, "12 of 12 images", "training")


def test_evaluating_on_training_pictures_is_refused(
    run: RunCommand, trained: Path, photos: Path, tmp_path: Path
) -> None:
    asked = ("eval", "--task", "captions", "--adapter", trained, "--out", tmp_path / "run")
    assert_two_lines(run(*asked, "--data", photos / "rows.jsonl"), "--seen allow")


def test_an_adapter_of_another_backbone_is_refused(
    run: RunCommand, adapter: Path, photos: Path
) -> None:
    assert_two_lines(generate_with(run, adapter, photos, "--backbone", "tiny-t5"), "tiny-opt")


def test_an_adapter_of_another_format_is_refused(
    run: RunCommand, adapter: Path, photos: Path
) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, "format": 99}))
    assert_two_lines(generate_with(run, adapter, photos), "99")


def test_a_folder_without_an_adapter_is_refused(
    run: RunCommand, tmp_path: Path, photos: Path
) -> None:
    assert_two_lines(generate_with(run, tmp_path, photos), "adapter")


@pytest.mark.parametrize("threshold", ["-0.1", "1.5", "nan"])
def test_a_threshold_out_of_range_is_refused(
    run: RunCommand, trained: Path, photos: Path, threshold: str
) -> None:
    found = generate_with(run, trained, photos, f"--threshold={threshold}")
    assert_two_lines(found, "0", "1")


def test_an_unknown_backbone_is_refused(run: RunCommand, tmp_path: Path) -> None:
    assert_two_lines(run("inspect", tmp_path / "nowhere"), "nowhere")


def test_a_missing_picture_to_answer_about_is_named(
    run: RunCommand, trained: Path, tmp_path: Path
) -> None:
    found = run("generate", "--adapter", trained, "--image", tmp_path / "gone.jpg")
    assert_two_lines(found, "gone.jpg")


def test_a_prompt_without_its_image_is_refused(run: RunCommand, trained: Path) -> None:
    found = run("generate", "--adapter", trained, "--prompt", "Question: what is it? Answer:")
    assert_two_lines(found, "--image")
