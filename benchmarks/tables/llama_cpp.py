"""Exits inside llama.cpp: speeds by format and mode, and which answers are the same."""

from typing import Any

from benchmarks.tables.markdown import Make, record, table

FORMATS = ("f16", "q8_0", "q4_1")
MODES = {
    "full": "ours, exits off",
    "early_exit": "ours, early exit at the shipped threshold",
    "every_token": "ours, every token at the exit",
    "lossless": "ours, lossless",
}
IDENTICAL = {
    "lossless_as_full": "lossless as full depth",
    "full_as_one_file": "full depth in two files as in one",
    "early_as_full": "early exit as full depth",
    "early_as_float32_early": "early exit as PyTorch's in float32",
    "full_as_float32_full": "full depth as PyTorch's in float32",
}


def speeds() -> str:
    """Tokens a CPU second, and multiples of llama.cpp's own full depth."""
    ways = {
        (w["runtime"], w["format"], w["mode"]): w for w in record("llama-cpp")["timings"]["ways"]
    }

    def cells(runtime: str, mode: str) -> list[str]:
        return [_speed(ways[runtime, layers, mode]) for layers in FORMATS]

    rows = [("llama.cpp alone, one file", *cells("llama.cpp", "full"))]
    rows += [(title, *cells("offramp, llama.cpp", mode)) for mode, title in MODES.items()]
    return table(rows, ("", *FORMATS))


def in_torch() -> str:
    """The same in PyTorch, float32."""
    ways = {(w["runtime"], w["mode"]): w for w in record("llama-cpp")["timings"]["ways"]}
    titles = {("generate", "full"): "`generate`"}
    titles |= {("offramp, torch", mode): title for mode, title in MODES.items()}
    rows = [(t, f"{ways[n]['cpu_tokens_per_second']:.1f}") for n, t in titles.items()]
    return table(rows, ("", "float32"))


def _speed(way: dict[str, Any]) -> str:
    return f"{way['cpu_tokens_per_second']:.0f} ({way['over_llama_cpp']:.2f}x)"


def identical() -> str:
    """Identical answers, and CIDEr against the float32 full model's."""
    answers = record("llama-cpp")["answers"]
    n = answers["photographs"]
    rows = [
        (title, *(f"{answers['identical'][layers][name]} of {n}" for layers in FORMATS))
        for name, title in IDENTICAL.items()
    ]
    scores = {(s["runtime"], s["format"], s["mode"]): s for s in answers["cider"]}
    for mode in ("full", "early_exit", "lossless"):
        by_format = [scores["offramp, llama.cpp", layers, mode] for layers in FORMATS]
        title = f"CIDEr, {MODES[mode].removeprefix('ours, ')}"
        rows.append((title, *(_cider(score) for score in by_format)))
    return table(rows, ("", *FORMATS))


def _cider(score: dict[str, Any]) -> str:
    low, high = score["difference_interval"]
    return f"{score['CIDEr']:.3f} [{low:+.3f}, {high:+.3f}]"


TABLES: dict[str, Make] = {
    "llama-cpp-speeds": speeds,
    "llama-cpp-torch": in_torch,
    "llama-cpp-identical": identical,
}
FIGURES: dict[str, Make] = {}
