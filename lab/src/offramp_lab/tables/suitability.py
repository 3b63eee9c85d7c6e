"""The forecast of exits beside what trained exits gave."""

from statistics import median
from typing import Any

from offramp.report.html import times
from offramp.report.table import Table
from offramp_lab.tables.markdown import Make, MakeTable, multiple, record, tiny

MODELS = {
    "opt": tiny("opt"),
    "t5": tiny("t5"),
    "photo": "photo model",
    "photo-large-8": "photo model",
    "photo-small-8": "photo model, briefly trained",
    "photo-small-4": "photo model, briefly trained",
}
LEVEL = "0.95"


def _found() -> list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """By exit: its model, its forecast, what it gave once it was trained, and all speeds."""
    found = record("suitability")
    return [
        (model, told, trained, found[f"{kind}-speeds"])
        for kind, model in MODELS.items()
        for told, trained in zip(
            found[kind]["foretold"]["depths"], found[kind]["trained"], strict=True
        )
    ]


def beside() -> Table:
    """Shares of tokens, forecast / measured, and the speed at one level with its interval."""
    rows = []
    for model, told, trained, speeds in _found():
        both, speed = (told, trained), speeds[str(trained["depth"])]
        lossless = speeds.get("lossless")
        rows.append(
            (
                f"{model}, depth {told['depth']}",
                " / ".join(f"{of['agreement']:.1%}" for of in both),
                " / ".join(f"{of['settled'][LEVEL]:.1%}" for of in both),
                f"{times(told['speedup'][LEVEL])} / {multiple(speed)}",
                "-" if lossless is None else f"{times(told['lossless'])} / {multiple(lossless)}",
            )
        )
    titles = ("agree", "exit while 95% stay", "speed while 95% stay", "speed, lossless")
    return Table(("forecast / measured", *titles), rows)


def _cells() -> list[dict[str, Any]]:
    """Calibrated thresholds, each with its speed as it was foretold and as it was measured."""
    parts = record("suitability").values()
    return [cell for part in parts if "cells" in part for cell in part["cells"]]


def _ratios() -> list[float]:
    """Measured speeds over those foretold, ascending."""
    return sorted(cell["measured"]["times"] / cell["foretold"][0] for cell in _cells())


def _from(most: float) -> str:
    """How many measured speeds lie between a forecast's lower end and `most` times its upper."""
    ends = [(cell["foretold"], cell["measured"]["times"]) for cell in _cells()]
    return f"{sum(low <= at <= most * high for (_, low, high), at in ends)} of {len(ends)}"


TABLES: dict[str, MakeTable] = {"suitability": beside}
FIGURES: dict[str, Make] = {
    "calibrated-least": lambda: f"{_ratios()[0]:.2f}",
    "calibrated-median": lambda: f"{median(_ratios()):.2f}",
    "calibrated-most": lambda: f"{_ratios()[-1]:.2f}",
    "calibrated-inside": lambda: _from(1),
    "calibrated-above": lambda: _from(float("inf")),
}
