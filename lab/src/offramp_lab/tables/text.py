"""A language model without images, from its files to a server."""

from offramp.report.table import Table
from offramp_lab.tables.markdown import Make, MakeTable, Value, record
from offramp_lab.tables.runtimes import BESIDE_ALONE, beside_alone


def walk() -> Table:
    """Each command as it is typed: its CPU seconds, and the largest memory of its process."""
    return Table.of(
        record("text")["walk"],
        {
            "command": lambda step: f"`{step['command']}`",
            "CPU s": lambda step: f"{step['cpu_seconds']:.1f}",
            "MB": lambda step: f"{step['peak_megabytes']:,.0f}",
        },
    )


def speeds() -> Table:
    """By engine and mode, and of how many prompts the answer is full depth's."""
    found = record("text")
    rows = [
        (
            f"{one['engine']} {one['format']}, {way}",
            *cells,
            f"{one['as_full']} of {found['timed']}",
            f"{one['tokens_as_full']:.0%}",
        )
        for one in found["speeds"]
        for way, *cells in [beside_alone(one)]
    ]
    return Table(("", *BESIDE_ALONE, "answers as full depth's", "tokens in place"), rows)


def _said(command: str) -> Value:
    steps = {step["command"].split()[1]: step["said"] for step in record("text")["walk"]}
    found: Value = steps[command]
    return found


def _agreement() -> str:
    (agreement,) = _said("train")["agreement"].values()
    return f"{agreement:.0%}"


def _acceptance() -> str:
    (drafting,) = _said("train")["drafting"].values()
    return ", ".join(f"{share:.2f}" for share in drafting["acceptance"][:4])


TABLES: dict[str, MakeTable] = {"text-walk": walk, "text-speeds": speeds}
FIGURES: dict[str, Make] = {"text-agreement": _agreement, "text-acceptance": _acceptance}
