"""Where PyTorch is not installed: help, `env` and remedies are of what runs there."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from command_line import RunCommand, assert_two_lines

from offramp.cli.command_line import COMMANDS, LIGHT
from offramp.core.missing import how_to_install, install_command


class Distribution:
    """offramp-edge, installed from a checkout's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read_text(self, _: str) -> str:
        return json.dumps({"url": self.folder.as_uri(), "dir_info": {}})


@pytest.fixture
def edge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment of offramp-edge, of a checkout that is returned."""
    (tmp_path / "edge").mkdir()

    def distribution(name: str) -> Any:
        if name != "offramp-edge":
            raise metadata.PackageNotFoundError(name)
        return Distribution(tmp_path / "edge")

    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(metadata, "distribution", distribution)
    return tmp_path


def test_help_is_of_the_commands_that_run(
    edge: Path, run: RunCommand, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("--help")
    shown = capsys.readouterr().out
    assert all(f"\n    {name} " in shown for name in ("generate", "serve", "export", "env"))
    assert "offramp train" not in shown and "calibrate exits" not in shown
    with pytest.raises(SystemExit):
        run("generate", "--help")
    assert "--mmproj" in capsys.readouterr().out


@pytest.mark.parametrize("command", sorted({*COMMANDS} - {*LIGHT, "generate", "serve", "export"}))
def test_other_commands_say_what_they_need(edge: Path, run: RunCommand, command: str) -> None:
    named = (f"offramp {command} needs PyTorch", "environment of its own", f"pip install {edge}")
    told = run(command, "tiny-opt")
    assert_two_lines(told, *(word.replace(f" {edge}", "") for word in named))
    assert str(edge) in told[2]


@pytest.mark.parametrize(
    "words", [["generate", "photo", "--prompt", "Who?"], ["serve", "tiny-opt", "--port", "0"]]
)
def test_so_do_other_models(edge: Path, run: RunCommand, words: list[str]) -> None:
    assert_two_lines(run(*words), words[1], "no folder of a cut file", "needs PyTorch")


def test_a_misspelt_folder_is_answered_with_the_one_that_is_there(
    edge: Path, run: RunCommand
) -> None:
    (edge / "sliced").mkdir()
    assert_two_lines(run("generate", edge / "slicd"), f"Did you mean '{edge / 'sliced'}'?")


def test_env_tells_what_there_is(edge: Path, run: RunCommand) -> None:
    code, out, _ = run("env", "--json")
    found = json.loads(out)
    assert code == 0 and found["packages"]["torch"].startswith("not installed")
    assert found["offramp"] and found["cores"] and found["devices"].keys() == {"cpu"}


def test_a_remedy_names_no_extra_of_the_distribution_without_any(edge: Path) -> None:
    assert how_to_install("onnxruntime") == "Install it: pip install onnxruntime"
    assert install_command("train") == f"pip install '{edge}[train]'"
