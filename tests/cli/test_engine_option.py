"""One option says what runs the decoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import RunCommand, assert_two_lines
from PIL import Image

from offramp.engines import ENGINES


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


@pytest.mark.parametrize("old", ["--compile", "--prepack", "--runtime", "--exact-batches"])
def test_no_other_option_chooses_an_engine(old: str, image: Path, run: RunCommand) -> None:
    words = ("generate", "--adapter", "tiny-opt", "--image", image)
    assert_two_lines(run(*words, old), f"The option '{old}' is not known")


def test_what_runs_no_decoder_is_refused_with_what_does(image: Path, run: RunCommand) -> None:
    words = ("generate", "--adapter", "tiny-opt", "--image", image, "--engine", "tensorrt")
    assert_two_lines(run(*words), "--engine 'tensorrt' is not known", *ENGINES)


@pytest.mark.parametrize("engine", ["packed", "exact-batches"])
def test_weights_that_are_laid_out_write_the_same(
    engine: str, image: Path, run: RunCommand
) -> None:
    words = ("generate", "--adapter", "tiny-opt", "--image", image, "--json")
    plain, other = (
        json.loads(run(*words, *more)[1])["answer"] for more in ((), ("--engine", engine))
    )
    assert plain == other
