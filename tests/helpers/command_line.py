"""The command line at work: fixtures for its data and adapters; `conftest.py` makes them known."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from offramp import cli
from offramp.adapter import shipped
from offramp.calibration.profiler import measure_costs
from offramp.cli.command_line import COMMANDS, build_parser
from offramp.cli.parser import Parser
from offramp.data.scenes import language, world

RunCommand = Any
EVERY = tuple(COMMANDS)
"""Every command."""
TRAIN = ("--backbone", "tiny-opt", "--steps", 4, "--batch-size", 4, "--exit-kind", "layer")
LOADED = cache(shipped.load_tiny)


def parser_of(command: str) -> Parser:
    """The parser of a command."""
    assert command in COMMANDS
    return build_parser()


def measure_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """What commands measure, they measure once: how fast a tiny model is decides no law."""
    monkeypatch.setitem(measure_costs.__kwdefaults__, "repeats", 1)
    for name, value in {
        "offramp.cli.drafts.ROUNDS": 1,
        "offramp.calibration.draft_thresholds.THRESHOLDS": (0.0, 0.5),
        "offramp.calibration.draft_thresholds.LONGEST": (2, 7),
        "offramp.calibration.suitability.SECONDS": 0.0,
        "offramp.calibration.ways.TIMED": 2,
    }.items():
        monkeypatch.setattr(name, value)


@pytest.fixture
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_briefly(monkeypatch)


@pytest.fixture
def run(
    briefly: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> RunCommand:
    """Run the command line; returns (exit code, stdout, stderr). What it keeps of attempts is of
    one test, and the models that it loads are copies of those that were loaded first."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
    monkeypatch.setattr(shipped, "load_tiny", lambda *asked: copy.deepcopy(LOADED(*asked)))

    def command(*arguments: Any) -> tuple[int, str, str]:
        code = cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return command


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images with a JSONL of captions."""
    folder = tmp_path_factory.mktemp("photos")
    rows = []
    for index in range(12):
        scene = world.scene("train", index)
        world.render(scene).save(folder / f"{index}.png")
        rows.append({"image": f"{index}.png", "captions": [language.caption(scene)]})
    write_rows(folder / "rows.jsonl", rows)
    return folder


@pytest.fixture(scope="session")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter trained by the command line for a few steps."""
    out = tmp_path_factory.mktemp("adapter") / "exits"
    data = photos / "rows.jsonl"
    arguments = ["train", *TRAIN, "--data", data, "--depths", "2,5", "--out", out]
    assert cli.main([str(a) for a in arguments]) == 0
    return out


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy that a test may damage."""
    yield Path(shutil.copytree(trained, tmp_path / "exits"))


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with captions that `trained` has not seen."""
    folder = tmp_path_factory.mktemp("held_out")
    rows = []
    for index in range(12):
        scene = world.scene("calibration", index)
        world.render(scene).save(folder / f"{index}.png")
        rows.append({"image": f"{index}.png", "captions": [language.caption(scene)]})
    return write_rows(folder / "rows.jsonl", rows)


@pytest.fixture(scope="session")
def unlabelled(held_out: Path) -> Path:
    """The same images, alone."""
    rows = [json.loads(line) for line in held_out.read_text(encoding="utf-8").splitlines()]
    return write_rows(held_out.with_name("alone.jsonl"), [{"image": r["image"]} for r in rows])


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Two questions about an image of the shipped models' world."""
    scene = world.scene("test", 0)
    world.render(scene).save(tmp_path / "0.png")
    rows = [
        {"image": "0.png", "question": question, "answers": [answer]}
        for question, answer in language.questions(scene, 2)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def assert_two_lines(result: tuple[int, str, str], *words: str) -> None:
    code, out, err = result
    lines = err[err.index("error: ") :].rstrip("\n").split("\n")
    assert code in (1, 2)
    assert out == ""
    assert len(lines) == 2, lines
    assert "Traceback" not in err
    for word in words:
        assert word in err
