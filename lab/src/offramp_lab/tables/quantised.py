"""Weights in 8 and 4 bits, and prepacked ones: speed, memory and answers by format and mode."""

from offramp.report.table import Table
from offramp_lab.tables.markdown import MakeTable, Value, by, record
from offramp_lab.tables.runtimes import TORCH, by_format, cider_of, speed_over, timed_entries

FORMATS = {
    "float32": "",
    "float32, prepacked": ", packed",
    "bfloat16": ", bfloat16",
    "bfloat16, prepacked": ", bfloat16, packed",
    "int8": ", int8",
    "int4": ", int4",
    "int4, prepacked": ", int4, packed",
}
"""What the names of engines have behind them, by title."""
SCORED = ("float32", "int8", "int4", "bfloat16, prepacked")
MODES = {"full": "exits off", "lossless": "lossless", "early exit": "early exit"}


def speeds() -> Table:
    ways = {"`generate`": ("generate{}", "full", TORCH)}
    ways |= {title: ("PyTorch{}", mode, TORCH) for mode, title in MODES.items()}
    return by_format(timed_entries(record("quantised")), ways, FORMATS, _speed)


def _speed(entry: Value) -> str:
    """Tokens a second; over `generate` in float32 what is not of exits, or over exits off of the
    same format what is."""
    over = "over_generate" if entry["mode"] == "full" else "over_full"
    return speed_over(over)(entry)


def answers() -> Table:
    """Identical answers, and CIDEr against the float32 full model's."""
    found = record("quantised")["answers"]
    entries, n = by(found["entries"], "engine", "mode"), found["photographs"]
    rows = [
        (
            layers,
            MODES[mode],
            *(f"{entry[name]} of {n}" for name in ("as_own_full", "as_float32_full")),
            cider_of(entry),
        )
        for layers in SCORED
        for mode in ("full", "early exit")
        for entry in [entries[f"PyTorch{FORMATS[layers]}", mode]]
    ]
    titles = ("as its own full depth", "as float32's full depth", "CIDEr [difference]")
    return Table(("", "", *titles), rows)


TABLES: dict[str, MakeTable] = {"quantised-speeds": speeds, "quantised-answers": answers}
