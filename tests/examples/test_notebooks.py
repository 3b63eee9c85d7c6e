"""The notebooks of the documentation run, and show what their text says."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import offramp

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "notebooks"
SAYS = {
    "train-exits": ("Adapter(exits at 2 of 12", "lossless writes the full model's tokens: True"),
    "look-into-the-exits": (
        "logit lens, threshold 0.0: mean depth 2.00",
        "drafted, kept: ((",
        "depth of that word under it: 12",
        "score,threshold,changed,depth",
    ),
    "the-photo-model": (
        "lossless: A man wearing a black hat",
        "early_exit: 4.0 of 30 layers a word",
    ),
}
INSTALLS = "offramp is installed first"
PUBLIC = {"offramp.data.scenes", "offramp.adapter.shipped"}
"""Modules beside `offramp` itself whose names are stable."""


CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
"""The user's, which tests else leave alone."""


def is_built() -> bool:
    """Whether the photo model lies in the cache, so that nothing is fetched."""
    return any((CACHE / "offramp" / "photo").glob("*/model.safetensors"))


def shown(notebook: Any) -> str:
    """The text that the cells printed, or are."""
    texts = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            texts.append(output.get("text", "") or data.get("text/plain", ""))
    return "\n".join(texts)


def test_every_notebook_is_tested_and_in_the_navigation() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(SAYS)
    navigation = (FOLDER.parents[1] / "mkdocs.yml").read_text(encoding="utf-8")
    assert all(f"notebooks/{name}.ipynb" in navigation for name in SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_a_notebook_begins_with_installing_and_uses_names_that_are_stable(name: str) -> None:
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert INSTALLS in cells[0] and "pip install" in cells[0]
    stable = (FOLDER.parent / "stable.md").read_text(encoding="utf-8")
    code = "\n".join(cells)
    for module, names in re.findall(r"^from (offramp[\w.]*) import (.+)$", code, re.M):
        assert module in PUBLIC
        assert all(f"`{name}`" in stable for name in names.split(", "))
    for name in re.findall(r"\bofframp\.(\w+)", re.sub(r"from offramp\S*|-m offramp\S*", "", code)):
        assert name in offramp.__all__


@pytest.mark.parametrize("name", SAYS)
def test_a_notebook_runs(name: str, tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    if name == "the-photo-model" and not is_built():
        pytest.skip("the photo model is not built here")
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    committed = shown(notebook)
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"XDG_CACHE_HOME": str(CACHE)} if name == "the-photo-model" else {}
    client.execute(
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": path, **own}
    )
    for words in SAYS[name]:
        assert words in shown(notebook)
        assert words in committed, "the committed notebook has no outputs: run it once"
