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


@pytest.mark.llama_cpp
def test_an_export_times_lossless_decoding_where_it_has_images(
    run: RunCommand, photos: Path, made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = ("--data", photos / "rows.jsonl", "--limit", 2, "--max-new-tokens", 6)
    files = ("--gguf", "q4_0", "--depths", "2,5", "--out", tmp_path / "q4_0")
    code, _, _ = run("export", "--adapter", made, *files, *data)
    assert code == 0 and "as fast as full depth" in caplog.text
    assert "tokens a round (2 answers)" in caplog.text
