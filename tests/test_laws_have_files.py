"""Every law that CONTRIBUTING.md states has a file of tests."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_law_has_a_file() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    stated = re.findall(r"(?m)^(\d+)\. ", text.partition("## Laws")[2])
    files = {file.name.split("_")[1] for file in (ROOT / "tests" / "laws").glob("test_*.py")}
    assert {f"{int(number):02}" for number in stated} == files
