"""One colour code for depth: the report, the picture, the notebooks and the page take it from one
place. That the page draws it so is a test of the page, in a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from offramp.common.depth_color import STOPS, depth_color, ink_on
from offramp.report.gallery import token
from offramp.serving.server.app import _page

DOCS = Path(__file__).resolve().parents[2] / "docs"
GREY = re.compile(r"#([0-9a-f]{1,2})\1\1\b")


def test_the_ends_and_every_step_are_colours() -> None:
    assert depth_color(1, 12) == STOPS[0] and depth_color(12, 12) == STOPS[-1]
    assert depth_color(1, 1) == STOPS[0]
    shades = [depth_color(depth, 40) for depth in range(1, 41)]
    assert len(set(shades)) == 40 and all(re.fullmatch("#[0-9a-f]{6}", s) for s in shades)
    assert {ink_on(shade) for shade in shades} == {"#000", "#fff"}


def test_reports_take_it() -> None:
    word = token("word", 2, 12)
    assert (word["color"], word["ink"]) == (depth_color(2, 12), ink_on(depth_color(2, 12)))


def test_the_page_takes_it() -> None:
    page = _page()
    assert f"const COLORS = {json.dumps(list(STOPS))};" in page and "hsl(" not in page


def test_the_picture_takes_it() -> None:
    filled = set(
        re.findall(r'fill="(#\w+)"', (DOCS / "plots" / "photographer.svg").read_text("utf-8"))
    )
    grey = {color for color in filled if GREY.fullmatch(color)}
    assert filled - grey and filled - grey <= {depth_color(d, 30) for d in range(1, 31)}


@pytest.mark.parametrize("notebook", sorted((DOCS / "notebooks").glob("*.ipynb")))
def test_notebooks_take_it(notebook: Path) -> None:
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    assert not re.search(r"#[0-9a-fA-F]{6}", code)
    assert "cividis_r" in code or "color" not in code  # the same colours, by a public name
