"""A language model without images, from its files to a server."""

from typing import Any

from offramp.report.table import Table
from offramp_lab.tables.markdown import Make, MakeTable, record
from offramp_lab.tables.runtimes import BESIDE_ALONE, beside_alone


def speeds() -> Table:
    """By engine and mode, and of how many prompts the answer is full depth's."""
    found = record("text")
    rows = [
        (f"{one['engine']} {one['format']}, {way}", *cells, f"{one['as_full']} of {found['timed']}")
        for one in found["speeds"]
        if one["format"] != "q4_1" and one["mode"] != "full"
        for way, *cells in [beside_alone(one)]
    ]
    return Table(("", *BESIDE_ALONE, "same as exits off"), rows)


def _trained(measure: str) -> Any:
    """What training said of its one exit."""
    steps = {step["command"].split()[1]: step["said"] for step in record("text")["walk"]}
    (found,) = steps["train"][measure].values()
    return found


TABLES: dict[str, MakeTable] = {"text-speeds": speeds}
FIGURES: dict[str, Make] = {"text-agreement": lambda: f"{_trained('agreement'):.0%}"}
