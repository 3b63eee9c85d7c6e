"""A language model without images, from its files to a server."""

from offramp.report.table import Table
from offramp_lab.tables.markdown import MakeTable, record
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


TABLES: dict[str, MakeTable] = {"text-speeds": speeds}
