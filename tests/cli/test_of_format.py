"""Exits for a number format, on the command line: whom they learnt from is said where it counts."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from command_line import TRAIN, RunCommand


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


@pytest.fixture
def made(run: RunCommand, photos: Path, trained: Path, tmp_path: Path) -> Path:
    """`trained`, taught to draft on by the backbone in q4_0."""
    out, data = tmp_path / "made", photos / "rows.jsonl"
    how = (*TRAIN, "--data", data, "--drafting", trained, "--of-format", "q4_0", "--out", out)
    code, _, err = run("train", *how)
    assert code == 0, err
    return out


@pytest.mark.slow
def test_other_engines_and_formats_are_warned_of(
    run: RunCommand, photos: Path, made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code, _, _ = run("generate", "--adapter", made, "--image", photos / "0.png")
    assert code == 0 and "learnt from the backbone in q4_0" in caplog.text
    export = ("export", "--adapter", made, "--depths", "2,5")
    code, _, _ = run(*export, "--gguf", "q8_0", "--out", tmp_path / "q8_0")
    assert code == 0 and "agree less with it in q8_0" in caplog.text
    caplog.clear()
    code, _, _ = run(*export, "--gguf", "q4_0", "--out", tmp_path / "q4_0")
    assert code == 0 and "learnt from" not in caplog.text


def test_an_export_of_files_takes_no_data(run: RunCommand, photos: Path, tmp_path: Path) -> None:
    words = ("--gguf", "q4_0", "--out", tmp_path / "q4_0", "--data", photos / "rows.jsonl")
    code, _, err = run("export", "tiny-opt", *words)
    assert code == 1 and "calibrate --lossless" in err and not (tmp_path / "q4_0").exists()
