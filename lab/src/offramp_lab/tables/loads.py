"""Tables of the batch engine and of guesses under loads like those of use."""

from collections.abc import Mapping
from typing import Any

from offramp_lab.tables.markdown import Make, bold, record, table, times

Value = Mapping[str, Any]


def guesses() -> str:
    """How often the first exit is right, by threshold, where it exits and where it guesses."""
    models = {name: m for name, m in _figures("guesses").items()}
    rows = [
        (
            f"{at['threshold']:g}",
            *(cell for m in models.values() for cell in _guesses_at(m["thresholds"][n])),
        )
        for n, at in enumerate(next(iter(models.values()))["thresholds"])
    ]
    heads = [f"{name}: exit" for name in models], ("right of those", "right of the others")
    return table(rows, ("threshold", *(h for first in heads[0] for h in (first, *heads[1]))))


FEW = 20
"""Tokens, of which a share says little."""


def _guesses_at(at: Value) -> tuple[str, str, str]:
    exits, right = at["right_of_exits"], at["right"]
    return (
        f"{at['exit']:.0%}",
        "" if exits is None else f"{exits:.1%}",
        bold(f"{right:.0%}") if at["others"] >= FEW else f"too few ({at['others']})",
    )


def arrivals() -> str:
    """The engine at full depth against static batches, requests coming when they like."""
    rows = [
        (
            f"{key}, {way}",
            f"{entry[way]['tokens_per_second']:.0f}",
            bold(times(entry["measured"])) + f" ({entry['predicted']:.2f} predicted)"
            if way == "engine"
            else "1",
            f"{entry[way]['busy']:.1f}",
            *(
                ", ".join(f"{entry[way][what][p]:.1f}" for p in ("p50", "p95")) + " s"
                for what in ("first", "total")
            ),
        )
        for key, figures in record("engine").items()
        if "arrivals" in figures
        for entry in [figures["arrivals"]]
        for way in ("static", "engine")
    ]
    columns = ("", "tokens a second", "", "rows busy", "first token p50, p95", "answer p50, p95")
    return table(rows, columns)


def photographs() -> str:
    """Captions a second through the engine, in multiples of single requests at full depth."""
    rows = [
        (
            f"{dtype}, {way['way'].replace('_', ' ')}",
            f"{way['captions_per_second']:.2f} ({times(way['over_full_alone'])})",
            f"{way['captions_per_second_decode']:.2f} ({times(way['over_full_alone_decode'])})",
            f"{way['as_alone']} of {run['photographs']}",
            f"{way['cider']:.3f}",
        )
        for dtype, run in _figures("photographs").items()
        for way in run["ways"]
    ]
    columns = (
        "", "captions a second, end to end", "decoding alone", "as a single request's", "CIDEr"
    )  # fmt: skip
    return table(rows, columns)


def single() -> str:
    """Decoding speed of single captions: at each threshold early exit, lossless, and guesses."""
    rows = []
    for dtype, run in _figures("single").items():
        speeds = {name: way["speedup"] for name, way in run["ways"].items()}
        for threshold in (n.split()[2] for n in speeds if n.startswith("early")):
            plain = [speeds[f"plain {way}"] for way in (f"early exit {threshold}", "lossless")]
            for weights in ("", "prepacked ", "compiled "):
                loops = [
                    speeds[f"{weights}{way}"] for way in (f"early exit {threshold}", "lossless")
                ]
                guesses = {
                    n: v
                    for n, v in speeds.items()
                    if n.startswith(f"{weights}guesses {threshold} ")
                }
                best = max(guesses, key=lambda name: guesses[name])
                one = max(guesses[best], loops[0])
                rows.append(
                    (
                        f"{dtype}, {threshold}", weights.strip() or "plain",
                        ", ".join(map(times, plain)) if not weights else "",
                        *map(times, loops),
                        f"{times(guesses[best])} (from {best.split()[-1]})",
                        bold(times(one / max(plain))),
                        f"{run['ways'][best]['same']} of {run['photographs']}",
                    )
                )  # fmt: skip
    columns = (
        "threshold", "products", "loops before: early exit, lossless", "early exit", "lossless",
        "guesses", "gain over the loops before",
        "same answers",
    )  # fmt: skip
    return table(rows, columns)


def _figures(part: str) -> Value:
    figures: Value = record("loads")[part]["figures"]
    return figures


def _memory() -> list[Value]:
    """What was held after the first looks, in which memory still settles."""
    looks = _figures("memory")["looks"]
    return list(looks[len(looks) // 4 :])


TABLES: dict[str, Make] = {
    "guesses": guesses,
    "arrivals": arrivals,
    "photographs-at-once": photographs,
    "single": single,
}
FIGURES: dict[str, Make] = {
    "single-lossless": lambda: (
        f"{_figures('single')['float32']['ways']['prepacked lossless']['speedup']:.2f}"
    ),
    "memory-requests": lambda: f"{sum(_figures('memory')[n] for n in ('answered', 'cancelled')):,}",
    "memory-first": lambda: f"{_memory()[0]['memory_mib']:.0f}",
    "memory-last": lambda: f"{_memory()[-1]['memory_mib']:.0f}",
    "memory-tensors": lambda: _range([look["tensors"] for look in _memory()]),
    "memory-objects": lambda: _range([look["objects"] for look in _memory()]),
}


def _range(counts: list[int]) -> str:
    return " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)}))
