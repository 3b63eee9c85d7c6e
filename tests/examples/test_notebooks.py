"""The notebooks of the documentation run, and show what their text says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "notebooks"
SAYS = {
    "train-exits": ("Adapter(exits at 2 of 12", "lossless writes the full model's tokens: True"),
    "look-into-the-exits": (
        "logit lens, threshold 0.0: mean depth 2.00",
        "drafted, kept: ((",
        "depth of that word under it: 12",
    ),
}


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
def test_a_notebook_runs(name: str, tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    committed = shown(notebook)
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute(env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    for words in SAYS[name]:
        assert words in shown(notebook)
        assert words in committed, "the committed notebook has no outputs: run it once"
