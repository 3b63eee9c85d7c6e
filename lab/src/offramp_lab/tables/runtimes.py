"""Exits inside llama.cpp: speeds by format and mode, and which answers are the same."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from offramp.report.table import Table
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


def timed_entries() -> dict[tuple[str, str, str], Value]:
    return by(record("runtimes")["timings"]["entries"], *WAY)


def entry_at(layers: str, thresholds: Mapping[str, float]) -> Value:
    """Ours at thresholds that were chosen, of which the shipped ones have no name of their own."""
    chosen, entries = list(thresholds.values()), timed_entries()
    mode = f"early_exit at {chosen[0]:g}" if chosen else "full"
    return entries.get((OURS, layers, mode), entries[OURS, layers, "early_exit"])


def speed_over(name: str, unit: str = "tokens_per_second", digits: int = 0) -> Callable[[Any], str]:
    """A speed, and the multiple of the entry's that is called `name`, with its interval if it is
    known; of no entry nothing."""

    def cell(entry: Value | None) -> str:
        return "" if entry is None else f"{entry[unit]:.{digits}f} ({_ratio(entry, name)})"

    return cell


def _ratio(entry: Value, name: str) -> str:
    ratio, ends = f"{entry[name]:.2f}x", entry.get(f"{name}_interval")
    return with_range(ratio, ends, ".2f")


_speed = speed_over("over_llama_cpp", "cpu_tokens_per_second")


def _by_format(rows: Mapping[str, tuple[str, str]], cell: Callable[[Any], str] = _speed) -> Table:
    """Runtimes and modes by title, those that were measured, and what is said of their entry in
    each format."""
    entries = timed_entries()
    formats = {layers: layers for layers in FORMATS}
    there = {(name, mode) for name, _, mode in entries}
    found = {title: way for title, way in rows.items() if way in there}
    return Table.grid(
        found, formats, lambda way, layers: cell(entries.get((way[0], layers, way[1])))
    )


def speeds() -> Table:
    """Tokens a CPU second, and multiples of llama.cpp's own full depth."""
    alone = {
        "OpenVINO GenAI": ("OpenVINO GenAI", "full"),
        "llama.cpp alone, one file": ("llama.cpp", "full"),
    }
    return _by_format(alone | {title: (OURS, mode) for mode, title in MODES.items()})


def kernels() -> Table:
    """The same by llama.cpp's own kernels, and what exits alone gain by ours."""
    theirs = {f"{t}, by llama.cpp's kernels": (ITS_KERNELS, m) for m, t in MODES.items()}
    gains = {f"{t}, by our kernels, of exits off": (OURS, m) for m, t in [*MODES.items()][1:]}
    gained = _by_format(gains, lambda entry: _ratio(entry, "over_full"))
    return Table(gained.columns, (*_by_format(theirs).rows, *gained.rows))


def in_torch() -> Table:
    """The same in PyTorch, float32."""
    static = "generate, static cache, compiled"
    ways = {"`generate`": ("generate", "full"), f"`generate`{static[8:]}": (static, "full")}
    ways |= {title: ("offramp, torch", mode) for mode, title in MODES.items()}
    ways |= {f"{t}, compiled": ("offramp, torch, compiled", m) for m, t in MODES.items()}
    found = {t: timed_entries().get((way[0], "float32", way[1])) for t, way in ways.items()}
    cell = speed_over("over_generate", "cpu_tokens_per_second", 1)
    return Table(("", "float32"), [(title, cell(e)) for title, e in found.items() if e is not None])


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
            "CPU seconds a caption": lambda e: f"{e['end_to_end_cpu_seconds']:.2f}",
            "weights": lambda e: f"{e['weights_bytes'] / 1e6:.0f} MB",
            "decoding, of `generate`": lambda e: f"{e['over_generate']:.1f}x",
        },
    )


def identical() -> Table:
    """Identical answers, and CIDEr against the float32 full model's."""
    answers = record("runtimes")["answers"]
    n, scores = answers["photographs"], by(answers["cider"], *WAY)
    told: dict[str, Callable[[str], str]] = {
        title: lambda layers, name=name: f"{answers['identical'][layers][name]} of {n}"  # type: ignore[misc]
        for name, title in IDENTICAL.items()
    }
    for mode in ("full", "early_exit", "lossless"):
        told[f"CIDEr, {MODES[mode].removeprefix('ours, ')}"] = lambda layers, mode=mode: cider_of(  # type: ignore[misc]
            scores[OURS, layers, mode]
        )
    formats = {layers: layers for layers in answers["identical"]}
    return Table.grid(told, formats, lambda tell, layers: tell(layers))


def calibrated() -> Table:
    """Thresholds by format, and what they lose on the other half of the photographs."""
    formats = record("runtimes")["calibrated"]["formats"]
    told: dict[str, Callable[[str, Value], str]] = {
        "... tokens a CPU second": lambda layers, of: _speed(entry_at(layers, of["thresholds"])),
        "... CIDEr": lambda layers, of: cider_of(of),
        "... drop of CIDEr": lambda layers, of: f"{of['drop']:+.1%}",
    }
    rows = []
    for way, title in CHOSEN.items():
        found = {layers: formats[layers][way] for layers in formats}
        rows.append((title, *map(threshold_of, found.values())))
        if any(of["thresholds"] for of in found.values()):
            rows += [
                (what, *(tell(layers, of) for layers, of in found.items()))
                for what, tell in told.items()
            ]
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
    formats = {layers: layers for layers in sorted({layers for _, layers, _ in entries})}
    modes = dict.fromkeys(mode for runtime, _, mode in entries if runtime == OURS)
    ways = {"llama.cpp alone, one file": ("llama.cpp", "full")}
    for runtime, by_whose in ((OURS, "ours"), (ITS_KERNELS, "by llama.cpp's kernels")):
        ways |= {f"{by_whose}, {mode}": (runtime, mode) for mode in modes}
    cell = speed_over("over_llama_cpp", digits=2)
    return Table.grid(ways, formats, lambda way, layers: cell(entries[way[0], layers, way[1]]))


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
    rows = []
    for entry in record("runtimes-edge")["entries"]:
        cells = [
            f"{entry[f'{step}_seconds']:.2f} s, {entry[f'{step}_megabytes']:.0f} MB"
            if f"{step}_seconds" in entry
            else ""
            for step in ("import", "load", "answer")
        ]
        mode = f", {entry['mode'].replace('_', ' ')}" if entry["mode"] else ""
        rows.append((f"{entry['way']}{mode}", *cells))
    tokens = record("runtimes-edge")["tokens"]
    return Table(("CPU and peak memory", "import", "load", f"{tokens} tokens"), rows)


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
    rows = [
        (
            row["family"],
            f"`{row['graph']}`",
            f"{row['away']:.1e}",
            "none" if row["cut"] == 0 else f"{row['cut']:.1e}",
            *(f"{row[mode]} of {of}" for mode in ("full", "early_exit", "lossless")),
        )
        for row in found["families"]
    ]
    columns = ("decoder", "graph", "logits from the model's", "from one file's")
    return Table((*columns, "full", "early exit", "lossless, q8_0"), rows)


def threshold_of(row: Value) -> str:
    """What was chosen."""
    return ", ".join(f"{t:g}" for t in row["thresholds"].values()) or "none"


def cider_of(score: Value) -> str:
    """CIDEr and the interval of its difference."""
    return with_range(f"{score['CIDEr']:.3f}", score["difference_interval"], "+.3f")


def together(name: str) -> Table:
    """Four captions at once against one by one, by format and mode."""
    found = record(name)
    rows = [
        (
            f"{one['format']}, {one['mode'].replace('_', ' ')}",
            f"{one['one_by_one']:.0f}",
            f"{one['at_once']:.0f}",
            times_with_range(one),
            f"{one['same']} of {found['photographs']}",
        )
        for one in found["entries"]
    ]
    return Table(("tokens/CPU s", "one by one", "four at once", "times", "same answers"), rows)


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
