"""Laws of the distribution without PyTorch: the same package, and dependencies without it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "offramp"
HEAVY = {"torch", "torchvision", "transformers", "accelerate"}


def project(folder: Path) -> Any:
    return tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]


def name_of(requirement: str) -> str:
    return re.split(r"[^\w-]", requirement, maxsplit=1)[0]


def test_its_dependencies_are_the_whole_ones_and_the_extras_without_pytorch() -> None:
    whole, edge = project(ROOT), project(ROOT / "edge")
    known = {*whole["dependencies"], *whole["optional-dependencies"]["serve"]}
    known |= {*project(ROOT / "llama")["dependencies"]}
    assert set(edge["dependencies"]) <= known, "other ranges than the whole distribution's"
    names = {name_of(each) for each in edge["dependencies"]}
    assert {"numpy", "llama-cpp-python", "gguf", "jinja2", "pillow"} <= names
    assert names & HEAVY == set()
    assert edge["scripts"] == whole["scripts"]
    assert edge["requires-python"] == whole["requires-python"]


def test_its_wheel_holds_the_package_and_asks_for_no_pytorch(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="it builds wheels")
    pytest.importorskip("hatch_vcs", reason="it tells their version")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT / "edge",
        check=True,
        capture_output=True,
    )
    [file] = tmp_path.glob("offramp_edge-*.whl")
    with zipfile.ZipFile(file) as wheel:
        names = set(wheel.namelist())
        [metadata] = [name for name in names if name.endswith(".dist-info/METADATA")]
        said = Parser().parsestr(wheel.read(metadata).decode())
    assert said["Name"] == "offramp-edge"
    required = {name_of(each) for each in said.get_all("Requires-Dist")}
    assert required & HEAVY == set() and "llama-cpp-python" in required
    sources = {f"offramp/{p.relative_to(SOURCE).as_posix()}" for p in SOURCE.rglob("*.py")}
    assert sources <= names
    assert "offramp/serving/server/web/index.html" in names
    assert not [name for name in names if "__pycache__" in name]
