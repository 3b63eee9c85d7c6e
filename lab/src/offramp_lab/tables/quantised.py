"""Weights in 8 and 4 bits, and prepacked ones: speed, memory and answers by format and mode."""

from collections.abc import Callable
from functools import partial
from typing import Any

from offramp_lab.tables.markdown import Make, record, table
from offramp_lab.tables.runtimes import cider_of, threshold_of

FORMATS = (
    "float32", "float32, prepacked", "bfloat16", "bfloat16, prepacked", "int8", "int4",
    "int4, prepacked",
)  # fmt: skip
STOCK, OURS = "generate", "offramp, torch"
MODES = {
    "full": "exits off",
    "lossless": "lossless",
    "early_exit": "early exit at 0.2, as shipped",
    "threshold_0.1": "early exit at 0.1",
    "every_token": "every token at the exit",
}


def _entries(part: str) -> dict[tuple[str, str, str], dict[str, Any]]:
    entries = record("quantised")[part]["entries"]
    return {(e["runtime"], e["format"], e["mode"]): e for e in entries}


def speeds() -> str:
    """Tokens a CPU second, and multiples of Hugging Face's `generate` in float32."""
    return _by_mode(lambda e: f"{e['cpu_tokens_per_second']:.0f} ({e['over_generate']:.1f}x)")


def seconds() -> str:
    """Seconds of an answer on the wall, all included."""
    return _by_mode(lambda e: f"{e['end_to_end_seconds']:.2f}")


def _by_mode(cell: Callable[[dict[str, Any]], str]) -> str:
    entries = _entries("timings")
    ways = {"`generate`": (STOCK, "full")}
    ways |= {title: (OURS, mode) for mode, title in MODES.items()}
    rows = [
        (
            title,
            *(
                cell(entries[runtime, layers, mode]) if (runtime, layers, mode) in entries else ""
                for layers in FORMATS
            ),
        )
        for title, (runtime, mode) in ways.items()
    ]
    return table(rows, ("", *FORMATS))


def answers() -> str:
    """Identical answers, and CIDEr against the float32 full model's."""
    entries, n = _entries("answers"), record("quantised")["answers"]["photographs"]
    rows = []
    for (_, layers, mode), e in entries.items():
        if layers in FORMATS:
            same = [f"{e[name]} of {n}" for name in ("as_own_full", "as_float32_full")]
            rows.append((layers, MODES[mode], *same, cider_of(e)))
    return table(
        rows, ("", "", "as its own full depth", "as float32's full depth", "CIDEr [difference]")
    )


def memory() -> str:
    """Megabytes of weights."""
    found = record("quantised")["timings"]["memory"]
    parts = {"layers": "decoder layers", "model": "the whole model"}
    formats = ("float32", "bfloat16", "int8", "int4")
    rows = [(t, *(f"{found[f][p] / 1e6:.0f} MB" for f in formats)) for p, t in parts.items()]
    return table(rows, ("weights of", *formats))


def calibrated() -> str:
    """Thresholds that were chosen with int4, and what they lose on photographs that chose none."""
    rows = []
    for layers, ways in record("quantised")["calibrated"]["formats"].items():
        for way, title in (
            ("calibrated", "CIDEr down by at most 3% on the choosing half"),
            ("guaranteed", "ROUGE-L down by at most 0.03, guaranteed at 95%"),
        ):
            part = ways[way]
            level, cider = threshold_of(part), cider_of(part)
            rows.append(
                (layers, title, level, cider, f"{part['drop']:+.1%}", f"{part['risk']:+.3f}")
            )
    columns = ("", "chosen by", "threshold", "CIDEr [difference]", "drop", "ROUGE-L lost")
    return table(rows, columns)


def kernels() -> str:
    """Microseconds of a linear, by format and tokens in a call."""
    titles = {"layer": "a layer's, 576 to 1,536", "head": "the head, 576 to 49,152"}
    formats = [f for f in FORMATS if f != "int4, prepacked"]
    rows = [
        (titles[k["what"]], str(k["tokens"]), *(f"{k['microseconds'][f]:,.0f}" for f in formats))
        for k in record("quantised")["kernels"]
    ]
    return table(rows, ("linear", "tokens", *formats))


def multiple(mode: str) -> str:
    """How many times as fast as `generate` in float32 ours is with int4."""
    return f"{_entries('timings')[OURS, 'int4', mode]['over_generate']:.1f}"


TABLES: dict[str, Make] = {
    "quantised-calibrated": calibrated,
    "quantised-kernels": kernels,
    "quantised-speeds": speeds,
    "quantised-seconds": seconds,
    "quantised-answers": answers,
    "quantised-memory": memory,
}
FIGURES: dict[str, Make] = {
    f"quantised-{mode}": partial(multiple, mode) for mode in ("full", "threshold_0.1", "lossless")
}
"""Of int4."""
