"""A table says the same to a page, a document and a terminal."""

from __future__ import annotations

import pytest

from offramp.report.html import render
from offramp.report.table import Table

CALLS = [("full", 1.0), ("early <exit>", 2.5)]
TOLD = {"mode": lambda call: call[0], "speed": lambda call: f"{call[1]:.1f}x"}


def test_entries_become_rows_by_what_is_told_of_them() -> None:
    table = Table.of(CALLS, TOLD)
    assert table.columns == ("mode", "speed")
    assert table.rows == (("full", "1.0x"), ("early <exit>", "2.5x"))
    assert table == Table.grid(dict(CALLS), {"speed": 1}, lambda n, by: f"{n * by:.1f}x", "mode")


def test_what_is_told_may_be_a_format_of_an_entrys_fields() -> None:
    entries = [{"mode": mode, "times": {"full": speed}} for mode, speed in CALLS]
    assert Table.of(entries, {"mode": "{mode}", "speed": "{times[full]:.1f}x"}) == Table.of(
        CALLS, TOLD
    )


def test_it_reads_as_markdown_on_a_terminal_and_escaped_on_a_page() -> None:
    table = Table.of(CALLS, TOLD)
    assert table.markdown() == (
        "| mode | speed |\n| --- | --- |\n| full | 1.0x |\n| early <exit> | 2.5x |\n"
    )
    assert table.plain() == "mode          speed\nfull           1.0x\nearly <exit>   2.5x"
    page = render("exits", svg="", shares=table, tokens=2, mean_depth=1.0)
    assert '<th scope="row">early &lt;exit&gt;</th><td>2.5x</td>' in page


def test_a_row_has_a_cell_for_every_column() -> None:
    with pytest.raises(ValueError, match="2 cells"):
        Table(("a", "b"), [("one",)])


def test_no_entries_are_a_head_alone() -> None:
    assert Table.of([], TOLD).plain() == "mode  speed"
