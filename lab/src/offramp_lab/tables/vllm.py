"""What exits are worth inside vLLM, beside offramp's own engines."""

from collections.abc import Iterable
from functools import partial

import numpy as np

from offramp.report.table import Table
from offramp_lab.experiments.experiment import TIMES, Rates, times
from offramp_lab.tables.markdown import Make, MakeTable, Value, by, record, with_range

LOADS = ("1", "8", "24")
FULL = "vLLM", "full depth"
NAMES = {
    "early exit": "early exit, as it ships",
    "early exit, whole head": "the same over the whole vocabulary",
    "early exit, looser": "early exit, looser thresholds",
}


def measured(load: str) -> dict[tuple[str, str], Value]:
    """By engine and way."""
    found = record("vllm")
    rows = [row for who in ("vllm", "offramp") for row in found.get(f"{who} {load}", ())]
    return by(rows, "engine", "way")


def rates(way: Value, load: str) -> Rates:
    """Answers and seconds of each group that was asked at once [2, N]."""
    whole, seconds = way["answers"], way["seconds"]
    sizes = [min(int(load), whole - start) for start in range(0, whole, int(load))]
    return np.array([sizes, seconds])


def milliseconds(way: Value) -> float:
    return float(1e3 * sum(way["seconds"]) / way["answers"])


def ratio(way: Value, load: str) -> str:
    """Over vLLM's full depth, with its interval over groups."""
    of = times(rates(way, load), rates(measured(load)[FULL], load))
    value, *ends = (of[part] for part in TIMES)
    return with_range(f"{value:.2f}x", ends, ".2f")


def loads() -> Table:
    """CPU milliseconds an answer of every way at every load."""

    def cell(key: tuple[str, str], load: str) -> str:
        way = measured(load).get(key)
        return "" if way is None else f"{milliseconds(way):.0f} ({ratio(way, load)})"

    def kept(key: tuple[str, str]) -> str:
        found: Iterable[Value] = [w for load in LOADS if (w := measured(load).get(key))]
        return ", ".join(str(way["same_answers"]) for way in found)

    keys = list(measured("1"))
    return Table.of(
        keys,
        {
            "": lambda key: f"{key[0]}, {NAMES.get(key[1], key[1])}",
            **{f"{load} at once": partial(cell, load=load) for load in LOADS},
            "same answers, of 100": kept,
        },
    )


def over_full(way: str, load: str) -> str:
    return f"{milliseconds(measured(load)[FULL]) / milliseconds(measured(load)['vLLM', way]):.2f}x"


TABLES: dict[str, MakeTable] = {"vllm": loads}
FIGURES: dict[str, Make] = {
    f"vllm-{way.replace(' ', '-')}-{load}": partial(over_full, way, load)
    for way in ("lossless", "early exit")
    for load in LOADS
}
