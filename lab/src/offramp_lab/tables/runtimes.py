"""Exits inside llama.cpp: speeds by format and mode, and which answers are the same."""

from collections.abc import Mapping
from typing import Any

from offramp_lab.tables.markdown import Make, record, table, with_range

FORMATS = ("f16", "q8_0", "q4_1", "iq4_nl")
OURS, ITS_KERNELS = "offramp, llama.cpp", "offramp, llama.cpp, its own kernels"
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


def timed_entries() -> dict[tuple[str, str, str], dict[str, Any]]:
    """By runtime, number format and mode."""
    entries = record("runtimes")["timings"]["entries"]
    return {(e["runtime"], e["format"], e["mode"]): e for e in entries}


def entry_at(layers: str, thresholds: Mapping[str, float]) -> dict[str, Any]:
    """Ours at thresholds that were chosen, of which the shipped ones have no name of their own."""
    chosen, entries = list(thresholds.values()), timed_entries()
    mode = f"early_exit at {chosen[0]:g}" if chosen else "full"
    return entries.get((OURS, layers, mode), entries[OURS, layers, "early_exit"])


def speeds() -> str:
    """Tokens a CPU second, and multiples of llama.cpp's own full depth."""
    entries = timed_entries()
    rows = [("OpenVINO GenAI", *_cells(entries, "OpenVINO GenAI", "full"))]
    rows += [("llama.cpp alone, one file", *_cells(entries, "llama.cpp", "full"))]
    rows += [(title, *_cells(entries, OURS, mode)) for mode, title in MODES.items()]
    return table(rows, ("", *FORMATS))


def kernels() -> str:
    """The same by llama.cpp's own kernels, and what exits alone gain by ours."""
    entries = timed_entries()

    def gains(mode: str) -> list[str]:
        return [f"{entries[OURS, layers, mode]['over_full']:.2f}x" for layers in FORMATS]

    rows = [
        (f"{title}, by llama.cpp's kernels", *_cells(entries, ITS_KERNELS, mode))
        for mode, title in MODES.items()
    ]
    rows += [
        (f"{title}, by our kernels, of exits off", *gains(mode))
        for mode, title in MODES.items()
        if mode != "full"
    ]
    return table(rows, ("", *FORMATS))


def in_torch() -> str:
    """The same in PyTorch, float32."""
    entries = timed_entries()
    titles = {("generate", "full"): "`generate`"}
    titles |= {("generate, static cache, compiled", "full"): "`generate`, static cache, compiled"}
    titles |= {("offramp, torch", mode): title for mode, title in MODES.items()}
    titles |= {("offramp, torch, compiled", m): f"{t}, compiled" for m, t in MODES.items()}
    found = {t: entries.get((n[0], "float32", n[1])) for n, t in titles.items()}
    rows = [
        (title, f"{e['cpu_tokens_per_second']:.1f} ({e['over_generate']:.2f}x)")
        for title, e in found.items()
        if e is not None
    ]
    return table(rows, ("", "float32"))


def end_to_end() -> str:
    """Seconds of a caption, vision tower and prompt included, and what the weights take."""
    rows = [
        (
            f"{e['runtime']}, {e['format']}, {e['mode'].replace('_', ' ')}",
            f"{e['end_to_end_cpu_seconds']:.2f}",
            f"{e['weights_bytes'] / 1e6:.0f} MB",
            f"{e['over_generate']:.1f}x",
        )
        for e in record("runtimes")["timings"]["entries"]
        if e["mode"] in ("full", "early_exit")
        and e["runtime"] != ITS_KERNELS
        and not e["runtime"].startswith("OpenVINO")
    ]
    return table(rows, ("", "CPU seconds a caption", "weights", "decoding, of `generate`"))


def _cells(entries: Mapping[Any, dict[str, Any]], runtime: str, mode: str) -> list[str]:
    return [_speed(entries.get((runtime, layers, mode))) for layers in FORMATS]


def _speed(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return ""
    return f"{entry['cpu_tokens_per_second']:.0f} ({entry['over_llama_cpp']:.2f}x)"


def identical() -> str:
    """Identical answers, and CIDEr against the float32 full model's."""
    answers = record("runtimes")["answers"]
    n, formats = answers["photographs"], list(answers["identical"])
    rows = [
        (title, *(f"{answers['identical'][layers][name]} of {n}" for layers in formats))
        for name, title in IDENTICAL.items()
    ]
    scores = {(s["runtime"], s["format"], s["mode"]): s for s in answers["cider"]}
    for mode in ("full", "early_exit", "lossless"):
        by_format = [scores[OURS, layers, mode] for layers in formats]
        title = f"CIDEr, {MODES[mode].removeprefix('ours, ')}"
        rows.append((title, *(cider_of(score) for score in by_format)))
    return table(rows, ("", *formats))


def calibrated() -> str:
    """Thresholds by format, and what they lose on the other half of the photographs."""
    formats, rows = record("runtimes")["calibrated"]["formats"], []

    def speed(layers: str, mode: str) -> str:
        return _speed(entry_at(layers, formats[layers][mode]["thresholds"]))

    for mode, title in (
        ("calibrated", "CIDEr down by at most 3% on the choosing half"),
        ("guaranteed", "ROUGE-L down by at most 0.03, guaranteed at 95%"),
    ):
        rows.append((title, *(threshold_of(formats[layers][mode]) for layers in formats)))
        if not any(formats[layers][mode]["thresholds"] for layers in formats):
            continue
        rows.append(("... tokens a CPU second", *(speed(layers, mode) for layers in formats)))
        rows.append(("... CIDEr", *(cider_of(formats[layers][mode]) for layers in formats)))
        drops = (f"{formats[layers][mode]['drop']:+.1%}" for layers in formats)
        rows.append(("... drop of CIDEr", *drops))
    return table(rows, ("", *formats))


def guaranteed(figure: str) -> Make:
    """A figure of early exit in q8_0 by the guaranteed threshold."""

    def make() -> str:
        promise = record("runtimes")["calibrated"]["formats"]["q8_0"]["guaranteed"]
        return f"{entry_at('q8_0', promise['thresholds'])[figure]:.2f}"

    return make


def rows_in_a_call() -> str:
    """Milliseconds of the layers above the exit by tokens in a call."""
    costs = record("runtimes")["timings"]["row_milliseconds"]
    counts = list(costs[OURS][FORMATS[0]]["above"])
    rows = [
        (
            f"{layers}, {by}",
            f"{costs[runtime][layers]['below']['1']:.1f}",
            *(f"{costs[runtime][layers]['above'][count]:.1f}" for count in counts),
        )
        for layers in FORMATS
        for runtime, by in ((ITS_KERNELS, "llama.cpp's kernels"), (OURS, "ours"))
    ]
    above = [f"above: {count} token{'s' if int(count) > 1 else ''}" for count in counts]
    return table(rows, ("ms", "below the exit: 1 token", *above))


def shapes() -> str:
    """A 7B decoder with random weights: tokens a CPU second by share of tokens that exit."""
    entries = {
        (e["runtime"], e["format"], e["mode"]): e for e in record("runtimes-shapes")["entries"]
    }
    formats = sorted({layers for _, layers, _ in entries})
    modes = [mode for runtime, layers, mode in entries if (runtime, layers) == (OURS, formats[0])]

    def cells(runtime: str, mode: str) -> list[str]:
        found = [entries[runtime, layers, mode] for layers in formats]
        return [f"{e['tokens_per_second']:.2f} ({e['over_llama_cpp']:.2f}x)" for e in found]

    rows = [("llama.cpp alone, one file", *cells("llama.cpp", "full"))]
    for runtime, by in ((OURS, "ours"), (ITS_KERNELS, "by llama.cpp's kernels")):
        rows += [(f"{by}, {mode}", *cells(runtime, mode)) for mode in modes]
    return table(rows, ("", *formats))


def of_7b() -> str:
    """How many times as fast as llama.cpp alone where 75% exit, in the format it is fastest in."""
    entries = record("runtimes-shapes")["entries"]
    alone = {e["format"]: e["tokens_per_second"] for e in entries if e["runtime"] == "llama.cpp"}
    ours = {e["format"]: e for e in entries if (e["runtime"], e["mode"]) == (OURS, "75% exit")}
    return f"{ours[max(alone, key=lambda layers: alone[layers])]['over_llama_cpp']:.1f}"


def kquants() -> str:
    """Milliseconds of a call by rows: by ours, by llama.cpp's kernels, and the multiple."""
    entries = {
        (e["format"], e["kernels"], e["rows"]): e for e in record("runtimes-kquants")["entries"]
    }
    formats = dict.fromkeys(layers for layers, _, _ in entries)
    rows = dict.fromkeys(count for _, _, count in entries)

    def cell(layers: str, count: int) -> str:
        ours, theirs = (
            entries[layers, way, count]["milliseconds"] for way in ("ours", "llama.cpp")
        )
        return f"{ours:.1f} / {theirs:.1f} ({theirs / ours:.2f}x)"

    cells = [
        (
            layers,
            f"{entries[layers, 'ours', 1]['bytes'] / 1e6:.0f}",
            *(cell(layers, n) for n in rows),
        )
        for layers in formats
    ]
    titles = [f"{count} token{'s' if count > 1 else ''}" for count in rows]
    return table(cells, ("ours / llama.cpp's, ms", "MB", *titles))


def kquant_gain() -> str:
    """How many times as fast as llama.cpp's kernels a token is multiplied in q4_k."""
    entries = record("runtimes-kquants")["entries"]
    ours, theirs = (
        next(e["milliseconds"] for e in entries
             if (e["format"], e["kernels"], e["rows"]) == ("q4_k", way, 1))
        for way in ("ours", "llama.cpp")
    )  # fmt: skip
    return f"{theirs / ours:.1f}"


def edge() -> str:
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
    return table(rows, ("CPU and peak memory", "import", "load", f"{tokens} tokens"))


def photo_edge() -> str:
    """The sliced photo model: speeds without PyTorch, and which answers are the same."""
    found = record("runtimes-photo-edge")
    of = found["photographs"]

    def row(way: str) -> tuple[str, ...]:
        rate, over = found["tokens_per_cpu_second"][way], found["over_llama_cpp"][way]
        counts = [
            f"{found[name][way]} of {of}" if way in found[name] else ""
            for name in ("same_as_in_pytorch", "same_fed_with_its_embeddings")
        ]
        return way.replace("_", " "), f"{rate:.0f} ({over:.2f}x)", *counts

    columns = ("", "tokens a CPU second", "as in PyTorch", "... with its embeddings")
    return table([row(way) for way in found["tokens_per_cpu_second"]], columns)


def photo_edge_lossless() -> str:
    """Of how many photographs the lossless answer is the full model's."""
    found = record("runtimes-photo-edge")
    return f"{found['lossless_as_full']} of {found['photographs']}"


def families() -> str:
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
    return table(rows, (*columns, "full", "early exit", "lossless, q8_0"))


def threshold_of(row: Mapping[str, Any]) -> str:
    """What was chosen."""
    return ", ".join(f"{t:g}" for t in row["thresholds"].values()) or "none"


def cider_of(score: Mapping[str, Any]) -> str:
    """CIDEr and the interval of its difference."""
    return with_range(f"{score['CIDEr']:.3f}", score["difference_interval"], "+.3f")


TABLES: dict[str, Make] = {
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
}
FIGURES: dict[str, Make] = {
    "runtimes-guaranteed": guaranteed("over_llama_cpp"),
    "runtimes-guaranteed-exits": guaranteed("over_full"),
    "runtimes-7b": of_7b,
    "runtimes-q4_k": kquant_gain,
    "runtimes-photo-lossless": photo_edge_lossless,
}
