"""Weights in 8 and 4 bits, and prepacked ones: speed, memory and answers by format and mode."""

from functools import partial

from offramp.report.table import Table, Told
from offramp_lab.tables.markdown import MakeTable, Value, by, record
from offramp_lab.tables.runtimes import WAY, by_format, cider_of, speed_over

FORMATS = (
    "float32",
    "float32, prepacked",
    "bfloat16",
    "bfloat16, prepacked",
    "int8",
    "int4",
    "int4, prepacked",
)
SCORED = ("float32", "bfloat16, prepacked", "int8", "int4")
STOCK, OURS = "generate", "offramp, torch"
MODES = {"full": "exits off", "lossless": "lossless", "early_exit": "early exit"}


def _by_mode(cell: Told) -> Table:
    entries = by(record("quantised")["timings"]["entries"], *WAY)
    ways = {"`generate`": (STOCK, "full")}
    ways |= {title: (OURS, mode) for mode, title in MODES.items()}
    return by_format(entries, ways, FORMATS, cell)


def _speed(entry: Value) -> str:
    """Tokens a second; over `generate` in float32 what is not of exits, or over exits off of the
    same format what is."""
    over = "over_generate" if entry["mode"] == "full" else "over_full"
    return speed_over(over)(entry)


def answers() -> Table:
    """Identical answers, and CIDEr against the float32 full model's."""
    found = record("quantised")["answers"]
    n = found["photographs"]
    rows = [
        (
            entry["format"],
            MODES[entry["mode"]],
            *(f"{entry[name]} of {n}" for name in ("as_own_full", "as_float32_full")),
            cider_of(entry),
        )
        for entry in found["entries"]
        if entry["format"] in SCORED and entry["mode"] != "lossless"
    ]
    titles = ("as its own full depth", "as float32's full depth", "CIDEr [difference]")
    return Table(("", "", *titles), rows)


TABLES: dict[str, MakeTable] = {
    "quantised-speeds": partial(_by_mode, _speed),
    "quantised-answers": answers,
}
