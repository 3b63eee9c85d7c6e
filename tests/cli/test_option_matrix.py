"""Command lines that nobody wrote: each does what it says, or is refused in two lines.

`make fuzz FUZZ=3600 SEED=7` goes on for an hour; a failure names the words that were typed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from option_matrix import FUZZED, Places, drawn, make_strange, options_of

from offramp import cli
from offramp.core.errors import InputError

SECONDS = float(os.environ.get("OFFRAMP_FUZZ", "0"))
"""0: the first `FEW` alone, whatever time they take."""
FEW = 20
SEED = int(os.environ.get("OFFRAMP_FUZZ_SEED", "0"))
LONGEST = 180
"""Seconds of a command, on a machine that others use too."""


@pytest.fixture
def places(
    trained: Path,
    photos: Path,
    held_out: Path,
    tmp_path: Path,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Places:
    from offramp.serving.server import run

    def not_here(*_: Any, **__: Any) -> None:
        raise InputError("Nothing is served here.", "Serve elsewhere.")

    monkeypatch.setattr(run, "serve", not_here)
    shutil.copytree(photos, tmp_path / "photos")
    make_strange(tmp_path / "photos" / "strange")
    for name in ("empty", "working"):
        (tmp_path / name).mkdir()
    adapter = Path(shutil.copytree(trained, tmp_path / "exits"))
    monkeypatch.chdir(tmp_path / "working")
    return Places(adapter, tmp_path / "photos", held_out, tmp_path / "empty")


@contextmanager
def in_time(words: list[str]) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise AssertionError(f"it did not end: {words}")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LONGEST)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fault(words: list[str], places: Places, capsys: Any) -> str | None:
    """What is wrong with what a command line did; None: nothing."""
    try:
        with in_time(words):
            code = cli.main(words)
    except SystemExit as error:
        code = error.code
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    _, err = capsys.readouterr()
    if code not in (0, 1, 2):
        return f"it ended with {code}"
    if code:
        said = err[err.find("error: ") :].rstrip("\n").split("\n")
        if "error: " not in err or len(said) != 2 or "Traceback" in err:
            return f"it said {err[-500:]!r}"
        if max(map(len, said)) > 2100:
            return f"it said {max(map(len, said))} letters"
    left = [*Path.cwd().iterdir()]
    for path in left:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    named = any(word.partition("=")[0] == "--out" for word in words[-3:])
    return f"it wrote {left} into the working folder" if left and not named else None


@pytest.mark.slow
def test_whatever_is_typed_works_or_is_refused_in_two_lines(
    places: Places, capsys: pytest.CaptureFixture[str]
) -> None:
    end, number = time.monotonic() + SECONDS, 0
    while number < FEW if not SECONDS else time.monotonic() < end:
        words = drawn(random.Random(f"{SEED} {number}"), places)
        wrong = fault(words, places, capsys)
        assert wrong is None, f"seed {SEED}, command {number}: {words}: {wrong}"
        number += 1
        shutil.rmtree(places.empty, ignore_errors=True)
        places.empty.mkdir()
    print(f"{number} commands with seed {SEED}")


@pytest.mark.parametrize("command", FUZZED)
def test_the_matrix_knows_every_option(command: str) -> None:
    assert options_of(command)
