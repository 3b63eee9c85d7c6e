"""The forecast of exits beside what trained exits gave."""

from statistics import median
from typing import Any

from offramp.report.html import times
from offramp.report.table import Table
from offramp_lab.tables.markdown import Make, MakeTable, record, tiny, with_range

MODELS = {
    "opt": tiny("opt"),
    "t5": tiny("t5"),
    "photo": "photo model",
    "photo-large-8": "photo model",
    "photo-small-8": "photo model, briefly trained",
    "photo-small-4": "photo model, briefly trained",
}
LEVEL = "0.95"


def _found(kind: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The forecast of a model's one exit, what the trained exit gave, and its speed."""
    part = record("suitability")[kind]
    [told], [trained] = part["foretold"]["depths"], part["trained"]
    return told, trained, record("suitability")[f"{kind}-speeds"][str(trained["depth"])]


def beside() -> Table:
    """Shares of tokens, forecast / measured, and the speed at one level with its interval."""
    rows = []
    for kind, model in MODELS.items():
        told, trained, speed = _found(kind)
        both = (told, trained)
        faster = with_range(times(speed["value"]), speed["interval"], ".2f")
        rows.append(
            (
                f"{model}, depth {told['depth']}",
                " / ".join(f"{of['agreement']:.1%}" for of in both),
                " / ".join(f"{of['settled'][LEVEL]:.1%}" for of in both),
                f"{times(told['speedup'][LEVEL])} / {faster}",
            )
        )
    titles = ("agree", "exit while 95% stay", "speed while 95% stay")
    return Table(("forecast / measured", *titles), rows)


def _calibrated() -> dict[str, Any]:
    return {name: part for name, part in record("suitability").items() if "cells" in part}


def _ratios() -> list[float]:
    """Measured speeds of calibrated thresholds over those foretold, ascending."""
    cells = [cell for part in _calibrated().values() for cell in part["cells"]]
    return sorted(cell["measured"]["value"] / cell["foretold"][0] for cell in cells)


def _inside() -> str:
    """How many measured speeds lie in the forecast's interval."""
    cells = [cell for part in _calibrated().values() for cell in part["cells"]]
    inside = [c for c in cells if c["foretold"][1] <= c["measured"]["value"] <= c["foretold"][2]]
    return f"{len(inside)} of {len(cells)}"


def _above() -> str:
    """How many measured speeds are above the lower end of the forecast's interval."""
    cells = [cell for part in _calibrated().values() for cell in part["cells"]]
    above = [c for c in cells if c["measured"]["value"] >= c["foretold"][1]]
    return f"{len(above)} of {len(cells)}"


TABLES: dict[str, MakeTable] = {"suitability": beside}
FIGURES: dict[str, Make] = {
    "calibrated-least": lambda: f"{_ratios()[0]:.2f}",
    "calibrated-median": lambda: f"{median(_ratios()):.2f}",
    "calibrated-most": lambda: f"{_ratios()[-1]:.2f}",
    "calibrated-inside": _inside,
    "calibrated-above": _above,
}
