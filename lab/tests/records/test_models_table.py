"""The table of model types says what the record holds."""

from __future__ import annotations

from offramp.storage import read_json
from offramp_lab.records import models_table


def test_the_page_holds_the_records_table() -> None:
    page = models_table.PAGE.read_text(encoding="utf-8")
    inside = page.partition(models_table.START)[2].partition(models_table.END)[0]
    assert inside.strip() == models_table.table(read_json(models_table.RECORD))


def test_sixty_types_are_exact_in_every_column() -> None:
    types = read_json(models_table.RECORD)["types"].values()
    run = [found for found in types if "1" in found]
    for column in models_table.COLUMNS:
        assert sum(models_table.verdict(f, column) == "exact" for f in run) >= 60, column
