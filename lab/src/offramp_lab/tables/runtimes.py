"""Exits inside llama.cpp: speeds by format and mode, and which answers are the same."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from offramp.report.table import Table, Told, told
from offramp_lab.tables.markdown import (
    Make,
    MakeTable,
    Value,
    by,
    record,
    times_with_range,
    with_range,
)

FORMATS = ("f16", "q8_0", "q4_1", "iq4_nl")
OURS, ITS_KERNELS = "offramp, llama.cpp", "offramp, llama.cpp, its own kernels"
WAY = ("runtime", "format", "mode")
"""What an entry is of."""
MODES = {
    "full": "ours, exits off",
    "early_exit": "ours, early exit at the shipped threshold",
    "every_token": "ours, every token at the exit",
    "lossless": "ours, lossless",
}
IDENTICAL = {
    "lossless_as_full": "lossless as full depth",
    "early_as_full": "early exit as full depth",
    "early_as_float32_early": "early exit as PyTorch's in float32",
    "full_as_float32_full": "full depth as PyTorch's in float32",
}
CHOSEN = {
    "calibrated": "CIDEr down by at most 3% on the choosing half",
    "guaranteed": "ROUGE-L down by at most 0.03, guaranteed at 95%",
}


Entries = Mapping[tuple[str, str, str], Value]
"""By `WAY`."""


def timed_entries() -> Entries:
    return by(record("runtimes")["timings"]["entries"], *WAY)


def entry_at(layers: str, thresholds: Mapping[str, float]) -> Value:
    """Ours at thresholds that were chosen, of which the shipped ones have no name of their own."""
    chosen, entries = list(thresholds.values()), timed_entries()
    mode = f"early_exit at {chosen[0]:g}" if chosen else "full"
    return entries.get((OURS, layers, mode), entries[OURS, layers, "early_exit"])


def speed_over(name: str, unit: str = "tokens_per_second", digits: int = 0) -> Callable[[Any], str]:
    """A speed, and the multiple of the entry's that is called `name`, with its interval if it is
    known."""
    return lambda entry: f"{entry[unit]:.{digits}f} ({_ratio(entry, name)})"


def _ratio(entry: Value, name: str) -> str:
    ratio, ends = f"{entry[name]:.2f}x", entry.get(f"{name}_interval")
    return with_range(ratio, ends, ".2f")


_speed = speed_over("over_llama_cpp", "cpu_tokens_per_second")


def by_format(
    entries: Entries, ways: Mapping[str, tuple[str, str]], formats: Iterable[str], cell: Told
) -> Table:
    """Runtimes and modes by title, those that were measured, and what is said of their entry in
    each format; of none nothing."""

    def said(way: tuple[str, str], layers: str) -> str:
        entry = entries.get((way[0], layers, way[1]))
        return "" if entry is None else told(cell, entry)

    there = {(name, mode) for name, _, mode in entries}
    found = {title: way for title, way in ways.items() if way in there}
    return Table.grid(found, {layers: layers for layers in formats}, said)


def speeds() -> Table:
    """Tokens a CPU second, and multiples of llama.cpp's own full depth."""
    alone = {
        "OpenVINO GenAI": ("OpenVINO GenAI", "full"),
        "llama.cpp alone, one file": ("llama.cpp", "full"),
    }
    ways = alone | {title: (OURS, mode) for mode, title in MODES.items()}
    return by_format(timed_entries(), ways, FORMATS, _speed)


def kernels() -> Table:
    """The same by llama.cpp's own kernels, and what exits alone gain by ours."""
    theirs = {f"{t}, by llama.cpp's kernels": (ITS_KERNELS, m) for m, t in MODES.items()}
    gains = {f"{t}, by our kernels, of exits off": (OURS, m) for m, t in [*MODES.items()][1:]}

    def said(entry: Value) -> str:
        ours = entry["runtime"] == OURS
        return _ratio(entry, "over_full") if ours else _speed(entry)

    return by_format(timed_entries(), theirs | gains, FORMATS, said)


def in_torch() -> Table:
    """The same in PyTorch, float32."""
    static = "generate, static cache, compiled"
    ways = {"`generate`": ("generate", "full"), f"`generate`{static[8:]}": (static, "full")}
    ways |= {title: ("offramp, torch", mode) for mode, title in MODES.items()}
    ways |= {f"{t}, compiled": ("offramp, torch, compiled", m) for m, t in MODES.items()}
    cell = speed_over("over_generate", "cpu_tokens_per_second", 1)
    return by_format(timed_entries(), ways, ("float32",), cell)


def end_to_end() -> Table:
    """Seconds of a caption, vision tower and prompt included, and what the weights take."""
    shown = (
        e
        for e in record("runtimes")["timings"]["entries"]
        if e["mode"] in ("full", "early_exit")
        and e["runtime"] != ITS_KERNELS
        and not e["runtime"].startswith("OpenVINO")
    )
    return Table.of(
        shown,
        {
            "": lambda e: f"{e['runtime']}, {e['format']}, {e['mode'].replace('_', ' ')}",
            "CPU seconds a caption": "{end_to_end_cpu_seconds:.2f}",
            "weights": lambda e: f"{e['weights_bytes'] / 1e6:.0f} MB",
            "decoding, of `generate`": "{over_generate:.1f}x",
        },
    )


def identical() -> Table:
    """Identical answers, and CIDEr against the float32 full model's."""
    answers = record("runtimes")["answers"]
    n, scores = answers["photographs"], by(answers["cider"], *WAY)
    modes = ("full", "early_exit", "lossless")
    lines = {title: f"{{{name}}} of {n}" for name, title in IDENTICAL.items()}
    lines |= {f"CIDEr, {MODES[mode].removeprefix('ours, ')}": f"{{{mode}}}" for mode in modes}
    formats = {
        layers: {**same, **{mode: cider_of(scores[OURS, layers, mode]) for mode in modes}}
        for layers, same in answers["identical"].items()
    }
    return Table.grid(lines, formats, told)


def calibrated() -> Table:
    """Thresholds by format, and what they lose on the other half of the photographs."""
    formats = record("runtimes")["calibrated"]["formats"]
    kept: dict[str, Told] = {
        "... tokens a CPU second": lambda of: _speed(entry_at(of["format"], of["thresholds"])),
        "... CIDEr": cider_of,
        "... drop of CIDEr": "{drop:+.1%}",
    }
    rows = []
    for way, title in CHOSEN.items():
        found = [{**ways[way], "format": layers} for layers, ways in formats.items()]
        lines = {title: threshold_of} | (kept if any(of["thresholds"] for of in found) else {})
        rows += [(line, *(told(what, of) for of in found)) for line, what in lines.items()]
    return Table(("", *formats), rows)


def rows_in_a_call() -> Table:
    """Milliseconds of the layers above the exit by tokens in a call."""
    costs = record("runtimes")["timings"]["row_milliseconds"]
    calls = {"below the exit: 1 token": ("below", "1")}
    above = costs[OURS][FORMATS[0]]["above"]
    calls |= {f"above: {_tokens(int(count))}": ("above", count) for count in above}
    ways = {
        f"{layers}, {by_whose}": costs[runtime][layers]
        for layers in FORMATS
        for runtime, by_whose in ((ITS_KERNELS, "llama.cpp's kernels"), (OURS, "ours"))
    }
    return Table.grid(ways, calls, lambda of, call: f"{of[call[0]][call[1]]:.1f}", "ms")


def shapes() -> Table:
    """A 7B decoder with random weights: tokens a CPU second by share of tokens that exit."""
    entries = by(record("runtimes-shapes")["entries"], *WAY)
    formats = sorted({layers for _, layers, _ in entries})
    modes = dict.fromkeys(mode for runtime, _, mode in entries if runtime == OURS)
    ways = {"llama.cpp alone, one file": ("llama.cpp", "full")}
    for runtime, by_whose in ((OURS, "ours"), (ITS_KERNELS, "by llama.cpp's kernels")):
        ways |= {f"{by_whose}, {mode}": (runtime, mode) for mode in modes}
    return by_format(entries, ways, formats, speed_over("over_llama_cpp", digits=2))


def kquants() -> Table:
    """Milliseconds of a call by rows: by ours, by llama.cpp's kernels, and the multiple."""
    entries = record("runtimes-kquants")["entries"]
    rows = dict.fromkeys(entry["rows"] for entry in entries)

    def cell(layers: str, count: int) -> str:
        ours, theirs = _kquant(layers, count)
        return f"{ours:.1f} / {theirs:.1f} ({theirs / ours:.2f}x)"

    cells = [
        (layers, f"{entry['bytes'] / 1e6:.0f}", *(cell(layers, count) for count in rows))
        for layers, entry in by(entries, "format").items()
    ]
    return Table(("ours / llama.cpp's, ms", "MB", *map(_tokens, rows)), cells)


def _kquant(layers: str, rows: int) -> list[float]:
    """Milliseconds of a call: by ours, by llama.cpp's kernels."""
    entries = by(record("runtimes-kquants")["entries"], "format", "kernels", "rows")
    return [entries[layers, way, rows]["milliseconds"] for way in ("ours", "llama.cpp")]


def _tokens(count: int) -> str:
    return f"{count} token{'s' if count > 1 else ''}"


def kquant_gain() -> str:
    """How many times as fast as llama.cpp's kernels a token is multiplied in q4_k."""
    ours, theirs = _kquant("q4_k", 1)
    return f"{theirs / ours:.1f}"


def edge() -> Table:
    """CPU seconds and peak memory of a process, with PyTorch and without."""
    found = record("runtimes-edge")

    def way(entry: Value) -> str:
        return str(entry["way"]) + (f", {entry['mode'].replace('_', ' ')}" if entry["mode"] else "")

    def cell(step: str) -> Told:
        form = f"{{{step}_seconds:.2f}} s, {{{step}_megabytes:.0f}} MB"
        return lambda entry: told(form, entry) if f"{step}_seconds" in entry else ""

    steps = {"import": "import", "load": "load", f"{found['tokens']} tokens": "answer"}
    columns = {"CPU and peak memory": way} | {title: cell(step) for title, step in steps.items()}
    return Table.of(found["entries"], columns)


def beside_alone(one: Value) -> tuple[str, ...]:
    """Of an entry of `offramp_lab.records.runtimes.ways`: its speed, and that in two parts."""
    name = "the engine alone" if one["mode"] == "alone" else one["mode"].replace("_", " ")
    rate = f"{one['tokens_per_cpu_second']:.0f}"
    if one["mode"] == "alone":
        return name, rate, "1", "", ""
    return name, rate, *(times_with_range(one[part]) for part in ("all", "rest", "exits"))


AS_IN_PYTORCH = ("as_in_pytorch", "as_with_its_embeddings")
BESIDE_ALONE = ("tokens a CPU second", "of the engine alone", "by our kernels", "by exits")


def photo_edge() -> Table:
    """The sliced photo model: speeds without PyTorch, and which answers are the same."""
    found = record("runtimes-photo-edge")

    def same(one: Value, key: str) -> str:
        return f"{one[key]} of {found['photographs']}" if key in one else ""

    rows = [
        (f"{one['format']}, {way}", *cells, *(same(one, key) for key in AS_IN_PYTORCH))
        for one in found["entries"]
        for way, *cells in [beside_alone(one)]
    ]
    return Table(("", *BESIDE_ALONE, "as in PyTorch", "... with its embeddings"), rows)


def photo_edge_lossless() -> str:
    """Of how many photographs the lossless answer is the full model's, least of all formats."""
    found = record("runtimes-photo-edge")
    least = min(one["as_full"] for one in found["entries"] if one["mode"] == "lossless")
    return f"{least} of {found['photographs']}"


def families() -> Table:
    """By decoder family, on tiny random models: how near, and of how many prompts the same."""
    found = record("llama-families")
    of = found["prompts"]
    return Table.of(
        found["families"],
        {
            "decoder": "{family}",
            "graph": "`{graph}`",
            "logits from the model's": "{away:.1e}",
            "from one file's": lambda row: "none" if row["cut"] == 0 else f"{row['cut']:.1e}",
            "full": f"{{full}} of {of}",
            "early exit": f"{{early_exit}} of {of}",
            "lossless, q8_0": f"{{lossless}} of {of}",
        },
    )


def threshold_of(row: Value) -> str:
    """What was chosen."""
    return ", ".join(f"{t:g}" for t in row["thresholds"].values()) or "none"


def cider_of(score: Value) -> str:
    """CIDEr and the interval of its difference."""
    return with_range(f"{score['CIDEr']:.3f}", score["difference_interval"], "+.3f")


def together(name: str) -> Table:
    """Four captions at once against one by one, by format and mode."""
    found = record(name)
    return Table.of(
        found["entries"],
        {
            "tokens/CPU s": lambda one: f"{one['format']}, {one['mode'].replace('_', ' ')}",
            "one by one": "{one_by_one:.0f}",
            "four at once": "{at_once:.0f}",
            "times": times_with_range,
            "same answers": f"{{same}} of {found['photographs']}",
        },
    )


TABLES: dict[str, MakeTable] = {
    "runtimes-speeds": speeds,
    "runtimes-kernels": kernels,
    "runtimes-torch": in_torch,
    "runtimes-end-to-end": end_to_end,
    "runtimes-identical": identical,
    "runtimes-calibrated": calibrated,
    "runtimes-rows": rows_in_a_call,
    "runtimes-shapes": shapes,
    "runtimes-families": families,
    "runtimes-edge": edge,
    "runtimes-photo-edge": photo_edge,
    "runtimes-kquants": kquants,
    "runtimes-together": partial(together, "runtimes-together"),
    "runtimes-edge-together": partial(together, "runtimes-edge-together"),
}
FIGURES: dict[str, Make] = {
    "runtimes-q4_k": kquant_gain,
    "runtimes-photo-lossless": photo_edge_lossless,
}
