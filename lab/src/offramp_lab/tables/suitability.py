"""The forecast of exits beside what trained exits gave."""

from typing import Any

from offramp.report.html import times
from offramp.report.table import Table
from offramp_lab.tables.markdown import MakeTable, record, tiny, with_range

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


TABLES: dict[str, MakeTable] = {"suitability": beside}
