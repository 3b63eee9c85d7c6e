"""Weights in 8 and 4 bits, and prepacked ones: speed, memory and answers by format and mode; and
exits beside quantised backbones, scheme by scheme."""

from collections.abc import Callable
from functools import partial

from offramp.report.table import Table
from offramp_lab.tables.markdown import Make, MakeTable, Value, by, record
from offramp_lab.tables.runtimes import CHOSEN, WAY, cider_of, speed_over, threshold_of

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


def _entries(part: str) -> dict[tuple[str, str, str], Value]:
    return by(record("quantised")[part]["entries"], *WAY)


def _by_mode(cell: Callable[[Value], str]) -> Table:
    entries = _entries("timings")
    ways = {"`generate`": (STOCK, "full")}
    ways |= {title: (OURS, mode) for mode, title in MODES.items()}

    def told(way: tuple[str, str], layers: str) -> str:
        entry = entries.get((way[0], layers, way[1]))
        return "" if entry is None else cell(entry)

    return Table.grid(ways, {layers: layers for layers in FORMATS}, told)


def _speed(entry: Value) -> str:
    """Tokens a second; over `generate` in float32 what is not of exits, or over exits off of the
    same format what is."""
    over = "over_generate" if entry["mode"] == "full" else "over_full"
    return speed_over(over, "cpu_tokens_per_second")(entry)


def answers() -> Table:
    """Identical answers, and CIDEr against the float32 full model's."""
    n = record("quantised")["answers"]["photographs"]
    return Table(
        ("", "", "as its own full depth", "as float32's full depth", "CIDEr [difference]"),
        [
            (
                layers,
                MODES[mode],
                *(f"{e[name]} of {n}" for name in ("as_own_full", "as_float32_full")),
                cider_of(e),
            )
            for (_, layers, mode), e in _entries("answers").items()
            if layers in FORMATS
        ],
    )


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
        (layers, title, ways[way])
        for layers, ways in record("quantised")["calibrated"]["formats"].items()
        for way, title in CHOSEN.items()
    ]
    return Table.of(
        chosen,
        {
            "": lambda of: of[0],
            "chosen by": lambda of: of[1],
            "threshold": lambda of: threshold_of(of[2]),
            "CIDEr [difference]": lambda of: cider_of(of[2]),
            "drop": lambda of: f"{of[2]['drop']:+.1%}",
            "ROUGE-L lost": lambda of: f"{of[2]['risk']:+.3f}",
        },
    )


def kernels() -> Table:
    """Microseconds of a linear, by format and tokens in a call."""
    titles = {"layer": "a layer's, 576 to 1,536", "head": "the head, 576 to 49,152"}
    told: dict[str, Callable[[Value], str]] = {
        "linear": lambda k: titles[k["what"]],
        "tokens": lambda k: str(k["tokens"]),
    }
    for layers in FORMATS[:-1]:
        told[layers] = lambda k, layers=layers: f"{k['microseconds'][layers]:,.0f}"  # type: ignore[misc]
    return Table.of(record("quantised")["kernels"], told)


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
    told: dict[str, Callable[[Value], str]] = {
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
        "writes the float model's tokens": lambda row: f"{row['agreement']:.1%}",
    }

    def cells(row: Value) -> list[str]:
        if "refused" in row:
            return [f"not here: {row['refused'].rstrip('.')}", *[""] * (len(told) - 1)]
        return [tell(row) for tell in told.values()]

    rows = record("quantised-models")[model].items()
    return Table(("scheme", *told), [(name, *cells(row)) for name, row in rows])


def versions() -> str:
    return ", ".join(f"{name} {v}" for name, v in record("quantised-models")["versions"].items())


TABLES: dict[str, MakeTable] = {
    "quantised-calibrated": calibrated,
    "quantised-kernels": kernels,
    "quantised-speeds": partial(_by_mode, _speed),
    "quantised-seconds": partial(_by_mode, lambda e: f"{e['end_to_end_seconds']:.2f}"),
    "quantised-answers": answers,
    "quantised-memory": memory,
    "quantised-tiny": partial(schemes, "tiny"),
    "quantised-photo": partial(schemes, "photo"),
}
FIGURES: dict[str, Make] = {"quantised-versions": versions}
