"""Tables of the batch engine and of guesses under loads like those of use."""

from typing import Any

from offramp.report.html import times
from offramp.report.table import Table
from offramp_lab.tables.markdown import Make, MakeTable, Value, bold, record

FEW = 20
"""Tokens, of which a share says little."""


def _figures(part: str) -> Any:
    return record("loads")[part]["figures"]


def guesses() -> Table:
    """How often the first exit is right, by threshold, where it exits and where it guesses."""
    models = _figures("guesses")
    levels = [f"{at['threshold']:g}" for at in next(iter(models.values()))["thresholds"]]
    told: dict[str, Any] = {
        ": exit": lambda at: f"{at['exit']:.0%}",
        "right of those": lambda at: (
            "" if at["right_of_exits"] is None else f"{at['right_of_exits']:.1%}"
        ),
        "right of the others": lambda at: (
            bold(f"{at['right']:.0%}") if at["others"] >= FEW else f"too few ({at['others']})"
        ),
    }
    return Table(
        ("threshold", *(f"{m}{t}" if t[0] == ":" else t for m in models for t in told)),
        [
            (at, *(tell(m["thresholds"][n]) for m in models.values() for tell in told.values()))
            for n, at in enumerate(levels)
        ],
    )


def arrivals() -> Table:
    """The engine at full depth against static batches, requests coming when they like."""

    def seconds(of: Value) -> str:
        return ", ".join(f"{of[p]:.1f}" for p in ("p50", "p95")) + " s"

    measured = {k: f["arrivals"] for k, f in record("engine").items() if "arrivals" in f}
    return Table(
        ("", "tokens a second", "", "rows busy", "first token p50, p95", "answer p50, p95"),
        [
            (
                f"{key}, {way}",
                f"{of[way]['tokens_per_second']:.0f}",
                bold(times(of["measured"])) + f" ({of['predicted']:.2f} predicted)"
                if way == "engine"
                else "1",
                f"{of[way]['busy']:.1f}",
                *(seconds(of[way][what]) for what in ("first", "total")),
            )
            for key, of in measured.items()
            for way in ("static", "engine")
        ],
    )


def photographs() -> Table:
    """Captions a second through the engine, in multiples of single requests at full depth."""

    def speed(way: Value, what: str = "") -> str:
        return f"{way['captions_per_second' + what]:.2f} ({times(way['over_full_alone' + what])})"

    ways = [(n, run, way) for n, run in _figures("photographs").items() for way in run["ways"]]
    return Table.of(
        ways,
        {
            "": lambda of: f"{of[0]}, {of[2]['way'].replace('_', ' ')}",
            "captions a second, end to end": lambda of: speed(of[2]),
            "decoding alone": lambda of: speed(of[2], "_decode"),
            "as a single request's": lambda of: f"{of[2]['as_alone']} of {of[1]['photographs']}",
            "CIDEr": lambda of: f"{of[2]['cider']:.3f}",
        },
    )


def single() -> Table:
    """Decoding speed of single captions: at each threshold early exit, lossless, and guesses."""
    rows = []
    for dtype, run in _figures("single").items():
        speeds = {name: way["speedup"] for name, way in run["ways"].items()}
        for threshold in (n.split()[2] for n in speeds if n.startswith("early")):
            two = (f"early exit {threshold}", "lossless")
            plain = [speeds[f"plain {way}"] for way in two]
            for weights in ("", "prepacked ", "compiled "):
                loops = [speeds[weights + way] for way in two]
                guesses = (n for n in speeds if n.startswith(f"{weights}guesses {threshold} "))
                best = max(guesses, key=lambda name: speeds[name])
                rows.append(
                    (
                        f"{dtype}, {threshold}",
                        weights.strip() or "plain",
                        "" if weights else ", ".join(map(times, plain)),
                        *map(times, loops),
                        f"{times(speeds[best])} (from {best.split()[-1]})",
                        bold(times(max(speeds[best], loops[0]) / max(plain))),
                        f"{run['ways'][best]['same']} of {run['photographs']}",
                    )
                )
    columns = (
        "threshold", "products", "loops before: early exit, lossless", "early exit", "lossless",
        "guesses", "gain over the loops before", "same answers",
    )  # fmt: skip
    return Table(columns, rows)


def _memory() -> list[Value]:
    """What was held after the first looks, in which memory still settles."""
    looks = _figures("memory")["looks"]
    return list(looks[len(looks) // 4 :])


def _range(name: str) -> str:
    counts = [look[name] for look in _memory()]
    return " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)}))


TABLES: dict[str, MakeTable] = {
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
    "memory-tensors": lambda: _range("tensors"),
    "memory-objects": lambda: _range("objects"),
}
