"""Weights in 8 and 4 bits, and prepacked ones: speed, memory and answers by format and mode; and
exits beside quantised backbones, scheme by scheme."""

from functools import partial

from offramp.report.table import Table, Told, told
from offramp_lab.tables.markdown import Make, MakeTable, Value, by, record
from offramp_lab.tables.runtimes import CHOSEN, WAY, by_format, cider_of, speed_over, threshold_of

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


def calibrated() -> Table:
    """Thresholds that were chosen with int4, and what they lose on photographs that chose none."""
    chosen = [
        {**ways[way], "format": layers, "by": title}
        for layers, ways in record("quantised")["calibrated"]["formats"].items()
        for way, title in CHOSEN.items()
    ]
    return Table.of(
        chosen,
        {
            "": "{format}",
            "chosen by": "{by}",
            "threshold": threshold_of,
            "CIDEr [difference]": cider_of,
            "drop": "{drop:+.1%}",
            "ROUGE-L lost": "{risk:+.3f}",
        },
    )


def kernels() -> Table:
    """Microseconds of a linear, by format and tokens in a call."""
    titles = {"layer": "a layer's, 576 to 1,536", "head": "the head, 576 to 49,152"}
    columns: dict[str, Told] = {"linear": lambda k: titles[k["what"]], "tokens": "{tokens}"}
    columns |= {layers: f"{{microseconds[{layers}]:,.0f}}" for layers in FORMATS[:-1]}
    return Table.of(record("quantised")["kernels"], columns)


# -- schemes --------------------------------------------------------------------------------------

ROUNDING = 2e-3
"""The largest difference of logits, relative to the largest, that is float32's."""


def _mode(mode: str, row: Value) -> str:
    """exact, where logits and answers are; else how far they are."""
    off, answers = row["logits"][mode], row["answers"]
    if not isinstance(off, float):
        return str(off)
    logits = "exact" if off <= ROUNDING else f"to {off:.0e}"
    if mode == "early_exit" or answers[mode] == answers["of"]:
        return logits
    return f"{logits}, {answers[mode]} of {answers['of']} answers"


def schemes(model: str) -> Table:
    """Which schemes exits can be trained, saved and run beside."""
    columns: dict[str, Told] = {
        "exits' tensors trained": lambda row: (
            f"{row['tensors'] - row['unmoved']} of {row['tensors']}"
        ),
        "saved and loaded": lambda row: (
            "yes" if row["kept"] == row["tensors"] else f"{row['kept']} of {row['tensors']} tensors"
        ),
        "full": partial(_mode, "full"),
        "early exit": partial(_mode, "early_exit"),
        "lossless": partial(_mode, "lossless"),
        "the float model's exits load": lambda row: "with a warning" if row["beside"] else "no",
        "writes the float model's tokens": "{agreement:.1%}",
    }

    def cells(row: Value) -> list[str]:
        if "refused" in row:
            return [f"not here: {row['refused'].rstrip('.')}", *[""] * (len(columns) - 1)]
        return [told(what, row) for what in columns.values()]

    rows = record("quantised-models")[model].items()
    return Table(("scheme", *columns), [(name, *cells(row)) for name, row in rows])


def versions() -> str:
    return ", ".join(f"{name} {v}" for name, v in record("quantised-models")["versions"].items())


TABLES: dict[str, MakeTable] = {
    "quantised-calibrated": calibrated,
    "quantised-kernels": kernels,
    "quantised-speeds": partial(_by_mode, _speed),
    "quantised-seconds": partial(_by_mode, "{end_to_end_seconds:.2f}"),
    "quantised-answers": answers,
    "quantised-memory": memory,
    "quantised-tiny": partial(schemes, "tiny"),
    "quantised-photo": partial(schemes, "photo"),
}
FIGURES: dict[str, Make] = {"quantised-versions": versions}
