"""Exits inside llama.cpp: speeds by format and mode, and which answers are the same."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from offramp.report.html import times
from offramp.report.table import Table, Told, told
from offramp_lab.experiments.factors import NAMED, Name
from offramp_lab.tables.markdown import (
    Make,
    MakeTable,
    Value,
    by,
    multiple,
    record,
    times_with_range,
    with_range,
)

FORMATS = ("f16", "q8_0", "q4_1", "iq4_nl")
TORCH, TOWER = "torch", "onnxruntime"
MODES = {
    "full": "offramp, exits off",
    "early exit": "offramp, early exit",
    "lossless": "offramp, lossless",
}
IDENTICAL = {
    "lossless_as_full": "lossless as exits off",
    "early_as_float32_early": "early exit as PyTorch's in float32",
    "full_as_float32_full": "exits off as PyTorch's in float32",
}


def timed_entries(found: Value) -> dict[Any, Value]:
    """Of a record, by engine, mode and tower."""
    return by(found["timings"]["entries"], *NAMED)


def speed_over(name: str, digits: int = 0) -> Callable[[Any], str]:
    """A speed, and the multiple of the entry's that is called `name`, with its interval if it is
    known."""
    return lambda entry: f"{entry['cpu_tokens_per_second']:.{digits}f} ({_ratio(entry, name)})"


def _ratio(entry: Value, name: str) -> str:
    """Without a range where an entry is held against itself."""
    ratio = entry[name]
    return multiple(ratio) if ratio["low"] < ratio["high"] else times(ratio["times"])


_speed = speed_over("over_llama_cpp")


def by_format(
    entries: Mapping[Any, Value], ways: Mapping[str, Name], formats: Mapping[str, str], cell: Told
) -> Table:
    """Ways by title, those that were measured, and what is said of their entry in each format; of
    none nothing. ways: {} in an engine's name is for what a format is called there."""

    def said(way: Name, layers: str) -> str:
        engine, *rest = way
        entry = entries.get((engine.format(layers), *rest))
        return "" if entry is None else told(cell, entry)

    found = {
        title: way for title, way in ways.items() if any(said(way, f) for f in formats.values())
    }
    return Table.grid(found, formats, said)


def speeds() -> Table:
    """Tokens a CPU second, and multiples of llama.cpp's own full depth."""
    entries = timed_entries(record("runtimes"))
    rows: dict[str, tuple[str, str, Callable[[Value], str]]] = {
        "llama.cpp alone, one file": ("llama.cpp {}", "full", _speed),
        "exits off": ("{}", "full", _speed),
        "lossless": ("{}", "lossless", _speed),
        "early exit": ("{}", "early exit", _speed),
        "early exit, over exits off": ("{}", "early exit", lambda one: _ratio(one, "over_full")),
        "early exit, llama.cpp's kernels": ("{}, its own kernels", "early exit", _speed),
    }
    return Table.grid(
        rows,
        {layers: layers for layers in FORMATS},
        lambda row, layers: row[2](entries[row[0].format(layers), row[1], TOWER]),
    )


def in_torch() -> Table:
    """The same in PyTorch, float32."""
    static = "generate, static cache, compiled"
    ways = {
        "`generate`": ("generate", "full", TORCH),
        f"`generate`{static[8:]}": (static, "full", TORCH),
        **{title: ("PyTorch", mode, TOWER) for mode, title in MODES.items()},
        **{f"{t}, compiled": ("PyTorch, compiled", mode, TOWER) for mode, t in MODES.items()},
    }
    cell = speed_over("over_generate", 1)
    return by_format(timed_entries(record("runtimes")), ways, {"float32": ""}, cell)


def identical() -> Table:
    """Identical answers, and CIDEr against the float32 full model's."""
    answers = record("runtimes")["answers"]
    n, scores = answers["photographs"], by(answers["cider"], *NAMED)
    lines = {title: f"{{{name}}} of {n}" for name, title in IDENTICAL.items()}
    lines |= {f"CIDEr, {MODES[mode][9:]}": f"{{{mode}}}" for mode in ("full", "early exit")}
    formats = {
        layers: {**same, **{mode: cider_of(scores[layers, mode, TOWER]) for mode in MODES}}
        for layers, same in answers["identical"].items()
    }
    return Table.grid(lines, formats, told)


def beside_alone(one: Value) -> tuple[str, ...]:
    """Of an entry of `offramp_lab.records.alone`: its speed, and that in two parts."""
    names = {"alone": "the engine alone", "full": "exits off"}
    name = names.get(one["mode"], one["mode"].replace("_", " "))
    rate = f"{one['tokens_per_cpu_second']:.0f}"
    if one["mode"] == "alone":
        return name, rate, "1", "", ""
    return name, rate, *(times_with_range(one[part]) for part in ("all", "rest", "exits"))


BESIDE_ALONE = ("tokens a CPU second", "over the engine alone", "by our kernels", "by exits")


def _largest(measure: str, *prefixes: str, but: tuple[str, ...] = ()) -> str:
    """The largest difference of logits of decoder families, on tiny random models."""
    found = max(
        row[measure]
        for row in record("llama-families")["families"]
        if row["family"].startswith(prefixes or "") and not row["family"].startswith(but)
    )
    return f"{found:.1e}" if found else "nothing"


def _families_same() -> str:
    """The least number of answers that are the same, of all families and modes."""
    found = record("llama-families")
    least = min(row[mode] for row in found["families"] for mode in _MODES)
    return f"{least} of {found['prompts']}"


_GELU = ("Gemma", "PaliGemma")
_MODES = ("full", "early_exit", "lossless")


def cider_of(score: Value) -> str:
    """CIDEr and the interval of its difference."""
    return with_range(f"{score['CIDEr']:.3f}", score["difference_interval"], "+.3f")


TABLES: dict[str, MakeTable] = {
    "runtimes-speeds": speeds,
    "runtimes-torch": in_torch,
    "runtimes-identical": identical,
}
FIGURES: dict[str, Make] = {
    "families": lambda: str(len(record("llama-families")["families"])),
    "families-away": partial(_largest, "away", but=_GELU),
    "families-away-gelu": partial(_largest, "away", *_GELU),
    "families-cut": partial(_largest, "cut", but=("PaliGemma",)),
    "families-cut-paligemma": partial(_largest, "cut", "PaliGemma"),
    "families-same": _families_same,
}
