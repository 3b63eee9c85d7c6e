"""`offramp calibrate NAME --engine vllm`; a server that answers by offramp stands in its place."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import RunCommand
from other_python import python_with_vllm

from offramp.data.scenes import world
from offramp_vllm import tell
from offramp_vllm.exports import serving

STAND_IN = Path(__file__).parents[1] / "helpers" / "vllm_stand_in.py"
HERE = {"engine": "vllm", "dtype": "float32", "quantized": "", "device": "cpu"}


def calibrated(run: RunCommand, tmp_path: Path, engine: str, *more: Any) -> tuple[int, Any, str]:
    pictures, out = tmp_path / "held_out", tmp_path / engine
    pictures.mkdir(exist_ok=True)
    for index in range(16):
        world.render(world.scene("calibration", index)).save(pictures / f"{index}.png")
    code, said, err = run(
        *("calibrate", "tiny-opt", "--engine", engine, "--data", pictures, "--prompt", "Caption:"),
        *("--target", 0.4, "--max-new-tokens", 8, "--out", out, "--json", *more),
    )
    return code, json.loads(said) if code == 0 else said, err


@pytest.fixture
def stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Starts in vLLM's place, and lets the log tell what comes next."""
    program = f'exec {sys.executable} {STAND_IN} "$@"\n'
    monkeypatch.setenv(serving.PYTHON, str(python_with_vllm(tmp_path / "python", program)))
    caplog.set_level("INFO", "offramp")


@pytest.mark.slow
def test_a_server_is_calibrated_as_its_answers_are(
    run: RunCommand, stand_in: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    levels = ("--thresholds", 0.9, 0.5)
    code, served, err = calibrated(run, tmp_path, "vllm", *levels)
    assert code == 0, err
    assert "offramp serve" in caplog.text and "offramp generate" not in caplog.text
    _, own, _ = calibrated(run, tmp_path, "torch", *levels, "--score", "max_probability")
    for name in ("measured", "n", "answers"):  # the bound is a second attempt's
        assert served[name] == own[name], name
    assert served["policy"]["thresholds"] == own["policy"]["thresholds"] != {}
    adapter = json.loads((tmp_path / "vllm" / "adapter.json").read_text())
    [stands] = tell.guarantees([adapter["calibration"]], adapter["policy"], HERE)
    assert stands.reason == ""
    [elsewhere] = tell.guarantees([own], adapter["policy"], HERE)
    assert "engine" in elsewhere.reason


@pytest.mark.slow
def test_where_nothing_is_guaranteed_a_server_drafts_losslessly(
    run: RunCommand, stand_in: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code, found, _ = calibrated(run, tmp_path, "vllm", "--target", 0.001)
    assert code == 0 and "images" in found["reason"]
    assert "next: offramp serve tiny-opt --engine vllm" in caplog.text


@pytest.mark.slow
def test_a_server_whose_exits_are_off_is_not_calibrated(
    run: RunCommand, stand_in: None, tmp_path: Path
) -> None:
    (tmp_path / "off").touch()
    code, _, err = calibrated(run, tmp_path, "vllm")
    assert code == 1
    assert "switched the exits off" in err and "too few" in err


def test_a_server_that_does_not_start_says_why(
    run: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = python_with_vllm(tmp_path / "python", "echo no memory >&2; exit 1\n")
    monkeypatch.setenv(serving.PYTHON, str(python))
    code, _, err = calibrated(run, tmp_path, "vllm")
    assert code == 1
    assert "vLLM did not start: no memory" in err


@pytest.mark.parametrize("option", [("--first-threshold", 0.5), ("--score", "entropy")])
def test_what_a_server_does_not_tell_is_not_calibrated(
    option: tuple[Any, ...], run: RunCommand, tmp_path: Path
) -> None:
    code, _, err = calibrated(run, tmp_path, "vllm", *option)
    assert code == 1
    assert "one threshold of max_probability" in err


def test_other_commands_do_not_ask_a_server(run: RunCommand) -> None:
    code, _, err = run("generate", "tiny-opt", "--engine", "vllm")
    assert code == 1
    assert "offramp serve NAME --engine vllm" in err
