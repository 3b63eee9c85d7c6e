"""Weights in 8 and 4 bits, and prepacked ones: speed, memory and answers by format and mode."""

from functools import partial

from offramp.report.table import Table, Told
from offramp_lab.tables.markdown import MakeTable, Value, by, record
from offramp_lab.tables.runtimes import WAY, by_format, cider_of, speed_over

FORMATS = (
    "float32", "float32, prepacked", "bfloat16", "bfloat16, prepacked", "int8", "int4",
    "int4, prepacked",
)  # fmt: skip
STOCK, OURS = "generate", "offramp, torch"
MODES = {
    "full": "exits off",
    "lossless": "lossless",
    "early_exit": "early exit as shipped",
    "every_token": "every token at the exit",
}


def _by_mode(cell: Told) -> Table:
    entries = by(record("quantised")["timings"]["entries"], *WAY)
    ways = {"`generate`": (STOCK, "full")}
    ways |= {title: (OURS, mode) for mode, title in MODES.items()}
    return by_format(entries, ways, FORMATS, cell)


def _speed(entry: Value) -> str:
    """Tokens a second; over `generate` in float32 what is not of exits, or over exits off of the
    same format what is."""
    over = "over_generate" if entry["mode"] == "full" else "over_full"
    return speed_over(over, "cpu_tokens_per_second")(entry)


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
        if entry["format"] in FORMATS
    ]
    titles = ("as its own full depth", "as float32's full depth", "CIDEr [difference]")
    return Table(("", "", *titles), rows)


def memory() -> Table:
    """Megabytes of weights."""
    found = record("quantised")["timings"]["memory"]
    return Table.grid(
        {"decoder layers": "layers", "the whole model": "model"},
        {layers: found[layers] for layers in ("float32", "bfloat16", "int8", "int4")},
        lambda part, of: f"{of[part] / 1e6:.0f} MB",
        "weights of",
    )


def kernels() -> Table:
    """Microseconds of a linear, by format and tokens in a call."""
    titles = {"layer": "a layer's, 576 to 1,536", "head": "the head, 576 to 49,152"}
    columns: dict[str, Told] = {"linear": lambda k: titles[k["what"]], "tokens": "{tokens}"}
    columns |= {layers: f"{{microseconds[{layers}]:,.0f}}" for layers in FORMATS[:-1]}
    return Table.of(record("quantised")["kernels"], columns)


TABLES: dict[str, MakeTable] = {
    "quantised-kernels": kernels,
    "quantised-speeds": partial(_by_mode, _speed),
    "quantised-seconds": partial(_by_mode, "{end_to_end_seconds:.2f}"),
    "quantised-answers": answers,
    "quantised-memory": memory,
}
