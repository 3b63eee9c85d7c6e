"""The report pages of the documentation: each is of one run, the committed record's."""

from __future__ import annotations

import html
import json
import re
from typing import Any

import pytest

from offramp_lab.pages.reports import decided
from offramp_lab.places import DOCS, RECORDS


def record(kind: str) -> Any:
    return json.loads((RECORDS / "demo.json").read_text("utf-8"))[kind]


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_a_page_shows_the_figures_of_its_record_and_of_no_other_run(kind: str) -> None:
    page = html.unescape((DOCS / f"report-{kind}.html").read_text("utf-8"))
    made = record(kind)
    modes, about = made["modes"], made["provenance"]
    for figure in (
        modes["early_exit"]["speedup_decode"],
        modes["early_exit"]["speedup_end_to_end"],
        modes["lossless"]["speedup_decode"],
    ):
        assert f"{figure:.2f}x" in page
    assert about["date"][:10] in page
    assert (about["versions"]["commit"] or "")[:7] in page
    names = set(re.findall(rf"tiny-{kind}, (\w+)", page))
    assert names == {"demo"}


def test_another_runs_calibration_is_told_apart() -> None:
    made = record("opt")["calibration"]
    assert decided(made) == decided(json.loads(json.dumps(made)))
    other = json.loads(json.dumps(made))
    other["path"][0]["risk"] += 0.001
    assert decided(other) != decided(made)
