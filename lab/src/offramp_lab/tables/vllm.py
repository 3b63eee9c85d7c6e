"""What exits are worth inside vLLM, beside offramp's own engines."""

from functools import partial

import numpy as np

from offramp.report.table import Table
from offramp_lab.experiments.experiment import Rates, times
from offramp_lab.tables.markdown import Make, MakeTable, Value, by, multiple, record

LOADS = ("1", "8", "24")
FULL = "vLLM", "full depth, compiled"
"""As vLLM runs by itself."""
NAMES = {
    "full depth, compiled": "full depth",
    "early exit": "early exit, as it ships",
    "early exit, trust 0.4": "early exit by a trust of 0.4",
    "early exit, thresholds 0.1, 0.5": "early exit by thresholds of 0.1, first tokens 0.5",
    "early exit, thresholds 0.4, 0.7": "early exit by thresholds of 0.4, first tokens 0.7",
}


def measured(load: str) -> dict[tuple[str, str], Value]:
    """By engine and way."""
    found = record("vllm")
    rows = [row for who in ("vllm", "offramp") for row in found.get(f"{who} {load}", ())]
    return by(rows, "engine", "way")


def rates(way: Value, load: str, seconds: list[float]) -> Rates:
    """Answers of a way, and seconds, of each group that was asked at once [2, N]."""
    whole = way["answers"]
    sizes = [min(int(load), whole - start) for start in range(0, whole, int(load))]
    return np.array([sizes, seconds])


def milliseconds(way: Value) -> float:
    return float(1e3 * sum(way["seconds"]) / way["answers"])


def ratio(way: Value, load: str) -> str:
    """Over vLLM's full depth, with its interval over groups."""
    full = measured(load)[FULL]["seconds"]
    return multiple(times(rates(way, load, way["seconds"]), rates(way, load, full)))


def named(key: tuple[str, str]) -> str:
    engine, way = key
    eager = ", eagerly" if key == ("vLLM", "full depth") else ""
    return f"{engine}, {NAMES.get(way, way)}{eager}"


def as_expected() -> str:
    """Of answers in float32, those that are the ones of PyTorch alone: the fewest of all ways."""
    found = [measured(load) for load in LOADS]
    ways = [way for rows in found for (name, _), way in rows.items() if "llama.cpp" not in name]
    return f"{min(way['same_answers'] for way in ways)} of {ways[0]['answers']}"


def loads() -> Table:
    """CPU milliseconds an answer of every way at every load."""

    def cell(key: tuple[str, str], load: str) -> str:
        way = measured(load)[key]
        taken = f"{milliseconds(way):.0f}"
        return taken if key == FULL else f"{taken} ({ratio(way, load)})"

    def kept(key: tuple[str, str], which: str) -> str:
        counts = {str(measured(load)[key][which]) for load in LOADS if which in measured(load)[key]}
        return " to ".join(sorted(counts, key=int))

    def drafted(key: tuple[str, str]) -> str:
        value = measured("1")[key].get("tokens_a_round")
        return f"{value:.1f}" if value else ""

    keys = [*measured("1")]
    rounds = {"tokens a round at 1": drafted} if any(map(drafted, keys)) else {}
    as_full = partial(kept, which="full_answers")
    whole = {"full depth's answers, of 100": as_full} if any(map(as_full, keys)) else {}
    return Table.of(
        keys,
        {
            "": named,
            **{f"{load} at once": partial(cell, load=load) for load in LOADS},
            **rounds,
            **whole,
        },
    )


def forced() -> str:
    """Of a large random model, every token of which leaves, over its full depth, alone."""
    seconds = {
        way["exits"]: way["seconds_a_step"]
        for way in record("vllm")["shape"]["ways"]
        if way["at_once"] == 1
    }
    return f"{seconds[False] / seconds[True]:.2f}x"


def on_a_gpu(card: str, shape: str) -> str:
    """Calculated: early exit in vLLM over its full depth, a tenth of the tokens deeper."""
    [entry] = [e for e in record("gpu")["entries"] if (e["card"], e["shape"]) == (card, shape)]
    took = entry["milliseconds"]
    return f"{took['vLLM, full depth']['0.1'] / took['vLLM, early exit']['0.1']:.2f}x"


def spoken() -> str:
    """Answers of photo-chat over HTTP, in the mode with the fewest that are offramp's own."""
    found = record("vllm-chat")
    return f"{min(found['same'].values())} of {found['answers']}"


TABLES: dict[str, MakeTable] = {"vllm": loads}
FIGURES: dict[str, Make] = {
    "gpu-h100-7b": partial(on_a_gpu, "H100 SXM", "Qwen2.5-7B"),
    "gpu-h100-3b": partial(on_a_gpu, "H100 SXM", "Qwen2.5-3B"),
    "gpu-laptop-7b": partial(on_a_gpu, "RTX 4090 Laptop", "Qwen2.5-7B"),
    "gpu-laptop-3b": partial(on_a_gpu, "RTX 4090 Laptop", "Qwen2.5-3B"),
    "vllm-chat-same": spoken,
    "vllm-forced-1": forced,
    "vllm-same": as_expected,
    "vllm-lossless": lambda: ratio(measured("1")["vLLM", "lossless"], "1"),
}
