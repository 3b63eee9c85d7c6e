"""Tiny models, written once by the environment that has offramp: OFFRAMP_PYTHON."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine import close, engine

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model by name; OFFRAMP_MODELS keeps them from run to run."""
    kept = os.environ.get("OFFRAMP_MODELS")
    root = Path(kept) if kept else tmp_path_factory.mktemp("models")

    def make(name: str) -> Path:
        if not (root / name / "answers.json").exists():
            python = os.environ["OFFRAMP_PYTHON"]
            script = [python, str(HERE / "make_models.py"), str(root), name]
            subprocess.run(script, check=True)
        return root / name

    return make


@pytest.fixture
def serve() -> Iterator[Callable[..., Any]]:
    """Makes engines that are closed when the test is over."""
    open_ones: list[Any] = []

    def make(*args: Any, **options: Any) -> Any:
        open_ones.append(engine(*args, **options))
        return open_ones[-1]

    yield make
    while open_ones:
        close(open_ones.pop())
