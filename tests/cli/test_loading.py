"""What the commands load a model onto, and what they say of it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from command_line import RunCommand, assert_two_lines

from offramp.cli.command_line import build_parser
from offramp.cli.loading import check_engine
from offramp.core.errors import InputError
from offramp.engines.loading import choose_device
from offramp_photo import packages


@pytest.mark.parametrize(
    ("gpu", "asked", "is_tiny", "device", "said"),
    [
        (True, "auto", False, "cuda", "this machine has a GPU"),
        (True, "auto", True, "cpu", "a tiny model is faster there"),
        (True, "cpu", False, "cpu", "as asked"),
        (False, "auto", False, "cpu", None),
        (False, "cpu", False, "cpu", None),
    ],
)
def test_with_a_gpu_the_device_is_said_and_why(
    gpu: bool,
    asked: str,
    is_tiny: bool,
    device: str,
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    with caplog.at_level(logging.INFO):
        assert choose_device(asked, is_tiny=is_tiny) == device
    assert (said in caplog.text) if said else not caplog.text


def test_a_short_name_finds_exits_and_their_model(run: RunCommand, photos: Path) -> None:
    asked = ("generate", "--adapter", "tiny-opt", "--image", photos / "0.png", "--json")
    code, out, _ = run(*asked, "--max-new-tokens", 6)
    assert code == 0
    assert json.loads(out)["layers"] == 12


def test_a_shipped_model_without_exits_answers_at_full_depth(
    run: RunCommand, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = ("generate", "--adapter", "tiny-t5", "--image", photos / "0.png", "--json")
    with caplog.at_level(logging.INFO):
        code, out, _ = run(*asked, "--max-new-tokens", 6)
    found = json.loads(out)
    assert code == 0 and {step["depth"] for step in found["steps"]} == {found["layers"]}
    assert "tiny-t5 ships without exits: every token runs at full depth" in caplog.text
    assert "--threshold" not in caplog.text  # there is nothing that it would be of


@pytest.mark.parametrize("more", [(), ("--lossless",)])
def test_where_no_exits_are_to_be_saved_nothing_is_read(
    run: RunCommand, more: tuple[str, ...], tmp_path: Path
) -> None:
    asked = ("--adapter", "tiny-t5", "--data", tmp_path / "gone", "--out", tmp_path / "exits")
    assert_two_lines(run("calibrate", *asked, *more), "No exits for the tiny model", "offramp demo")


def test_without_its_package_the_photo_model_says_what_to_install(
    run: RunCommand, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "DATA", "offramp_photo_that_is_not_there")
    for command in (
        ("generate", "--adapter", "photo", "--image", photos / "0.png"),
        ("serve", "photo", "--port", 0),
        ("inspect", "photo"),
    ):
        assert_two_lines(run(*command), "pip install", "[photo]'")


def test_a_folder_of_ggufs_names_the_engine_that_sees_by_mtmd(tmp_path: Path) -> None:
    words = ["generate", "exits", "--image", "a.png", "--vision", "mtmd"]
    check_engine(build_parser().parse_args([*words, "--gguf", str(tmp_path)]))
    with pytest.raises(InputError, match="alone"):
        check_engine(build_parser().parse_args(words))
