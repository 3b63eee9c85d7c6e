"""One option says what runs the decoder; what said it before still does, and says so."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from command_line import RunCommand, assert_two_lines
from PIL import Image

from offramp import cli
from offramp.cli.command_line import build_parser
from offramp.cli.commands.serve import _check_serial
from offramp.cli.options import ENGINES

PLAIN = ("torch", False, False)
BEFORE = [
    (["--compile"], "compiled"),
    (["--prepack"], "packed"),
    (["--runtime", "cuda-graphs"], "cuda-graphs"),
    (["--runtime", "torch"], "torch"),
]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def read(*more: str, command: str = "generate") -> tuple[str, tuple[str, bool, bool]]:
    """The engine, and what commands read of it."""
    first = [command, *(["tiny-opt"] if command == "serve" else ["--adapter", "x"])]
    found = build_parser().parse_args([*first, *more])
    return found.engine, (found.runtime, found.compile, found.prepack)


@pytest.mark.parametrize("command", ["generate", "serve"])
def test_each_engine_is_one_thing(command: str) -> None:
    assert read(command=command) == ("torch", PLAIN)
    told = {name: read("--engine", name, command=command) for name in ENGINES}
    assert [engine for engine, _ in told.values()] == list(ENGINES)
    assert len({how for _, how in told.values()}) == len(ENGINES)
    assert told["torch"][1] == PLAIN


@pytest.mark.parametrize("old, engine", BEFORE)
def test_what_chose_an_engine_before_still_does_and_names_the_new_option(
    old: list[str], engine: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert read(*old) == read("--engine", engine)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{old[0]} is --engine {engine} now")


def test_one_slot_is_what_serial_was(caplog: pytest.LogCaptureFixture) -> None:
    arguments = build_parser().parse_args(["serve", "tiny-opt", "--serial"])
    with caplog.at_level(logging.WARNING):
        _check_serial(arguments)
    assert arguments.serial and "--slots 1" in caplog.text


@pytest.mark.parametrize(
    "both", [("--compile", "--prepack"), ("--engine", "packed", "--compile")], ids=" ".join
)
def test_two_engines_are_none(both: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--adapter", "x", *both]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert "two engines" in said[-2] and both[0] in said[-2]


def test_the_last_of_one_option_counts_as_a_files_does_before_it() -> None:
    assert read("--engine", "packed", "--engine", "compiled")[0] == "compiled"


def test_help_shows_one_option(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("generate", "serve", "eval", "calibrate"):
        with pytest.raises(SystemExit):
            build_parser().parse_args([command, "--help"])
        shown = capsys.readouterr().out
        assert "--engine NAME" in shown
        assert not {"--compile", "--prepack", "--runtime", "--serial"} & set(shown.split())


def test_exact_batches_are_of_weights_in_pytorch(image: Path, run: RunCommand) -> None:
    words = ("generate", "--adapter", "tiny-opt", "--exact-batches", "--engine", "compiled")
    assert_two_lines(run(*words, "--image", image), "--exact-batches is of PyTorch's packed")


def test_exact_batches_write_what_packed_weights_write(image: Path, run: RunCommand) -> None:
    words = ("generate", "--adapter", "tiny-opt", "--image", image, "--json")
    packed, exact = (
        json.loads(run(*words, *more)[1])["answer"]
        for more in (("--engine", "packed"), ("--exact-batches",))
    )
    assert packed == exact
