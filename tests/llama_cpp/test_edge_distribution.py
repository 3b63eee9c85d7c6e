"""Laws of the distribution without PyTorch: the same package, and dependencies without it."""

from __future__ import annotations

import os
import re
import shutil
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


@pytest.mark.slow
def test_its_wheel_holds_the_package_and_asks_for_no_pytorch(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="it builds wheels")
    pytest.importorskip("hatch_vcs", reason="it tells their version")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT / "edge",
        check=True,
        capture_output=True,
        env={**os.environ, "CC": "no-compiler"},  # what is compiled is another test's
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


@pytest.mark.slow
def test_a_wheel_brings_its_c_compiled(tmp_path: Path) -> None:
    """To a machine without a compiler, for every processor that the kernels are for."""
    hooks = [
        tomllib.loads((ROOT / name / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]
        for name in ("llama", "edge")
    ]
    paths = [hook["build"]["targets"]["wheel"]["hooks"]["custom"]["path"] for hook in hooks]
    assert paths == ["hatch_build.py", "../llama/hatch_build.py"]
    pytest.importorskip("hatchling", reason="it builds wheels")
    pytest.importorskip("hatch_vcs", reason="it tells their version")
    pytest.importorskip("llama_cpp", reason="its headers are compiled with")
    if shutil.which("cc") is None:
        pytest.skip("no C compiler on this machine")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT / "llama",
        check=True,
        capture_output=True,
    )
    [file] = tmp_path.glob("*.whl")
    assert not file.name.endswith("-any.whl")
    with zipfile.ZipFile(file) as wheel:
        wheel.extractall(tmp_path / "site")
    asks = """if True:
        from offramp_llama_cpp.native import compiling, recipe
        from offramp_llama_cpp.packages import headers
        for name, builds in recipe.FLAGS.items():
            read = None if name in recipe.WITHOUT_HEADERS else headers()
            for flags in builds:
                print(name, compiling.compiled(name, flags, read) is not None)"""
    told = subprocess.run(
        [sys.executable, "-c", asks],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(tmp_path / "site"), str(ROOT / "src"))),
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "CC": "no-compiler",
        },
    )
    assert told.stdout.split("\n")[:-1] == ["tap True", "drafts True", *["products True"] * 2]
