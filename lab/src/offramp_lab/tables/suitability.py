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
WAYS = ("thresholds", "trust")


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
    """The speed at one level, forecast / measured with its interval."""
    rows = []
    for model, told, trained, speeds in _found():
        speed = speeds[str(trained["depth"])]
        rows.append(
            (
                f"{model}, depth {told['depth']}",
                f"{times(told['speedup'][LEVEL])} / {multiple(speed)}",
            )
        )
    return Table(("forecast / measured", "speed while 95% of tokens stay"), rows)


def ways() -> Table:
    """Speeds of thresholds and of trust, forecast / measured, by the share of changed answers."""
    found = record("suitability")
    told, speeds = found["photo-ways"], found["photo-ways-speeds"]

    def both(told: float, speed: dict[str, Any]) -> str:
        return f"{times(told)} / {multiple(speed)}"

    rows = [["0%, lossless", "-", both(told["lossless"], speeds["lossless"])]]
    for place, share in enumerate(told["changed"]):
        own = [both(told[w][place][0], speeds[w][place]["measured"]) for w in WAYS]
        rows.append([f"{share:.0%}", *own])
    return Table(("change", *WAYS), rows)


def _of_trust(model: str) -> str:
    """The least and the most of trust's forecasts over its measured speeds."""
    found = record("suitability")
    both = zip(found[f"{model}-ways"]["trust"], found[f"{model}-ways-speeds"]["trust"], strict=True)
    ratios = [told[0] / own["measured"]["times"] for told, own in both]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


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


TABLES: dict[str, MakeTable] = {"suitability": beside, "suitability-ways": ways}
FIGURES: dict[str, Make] = {
    "forecast-trust-photo": lambda: _of_trust("photo"),
    "forecast-trust-opt": lambda: _of_trust("opt"),
    "calibrated-least": lambda: f"{_ratios()[0]:.2f}",
    "calibrated-median": lambda: f"{median(_ratios()):.2f}",
    "calibrated-most": lambda: f"{_ratios()[-1]:.2f}",
    "calibrated-inside": lambda: _from(1),
    "calibrated-above": lambda: _from(float("inf")),
}
