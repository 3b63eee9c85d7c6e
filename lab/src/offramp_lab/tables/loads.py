"""Tables of the batch engine and of guesses under loads like those of use."""

from functools import partial
from typing import Any

from offramp.report.html import times
from offramp.report.table import Table, Told, told
from offramp_lab.tables.markdown import Make, MakeTable, Value, bold, by, record, times_with_range

FEW = 20
"""Tokens, of which a share says little."""


def _figures(part: str) -> Any:
    return record("loads")[part]["figures"]


def guesses() -> Table:
    """How often the first exit is right, by threshold, where it exits and where it guesses."""
    models = _figures("guesses")
    levels = [f"{at['threshold']:g}" for at in next(iter(models.values()))["thresholds"]]
    lines: dict[str, Told] = {
        ": exit": "{exit:.0%}",
        "right of those": lambda at: (
            "" if at["right_of_exits"] is None else f"{at['right_of_exits']:.1%}"
        ),
        "right of the others": lambda at: (
            bold(f"{at['right']:.0%}") if at["others"] >= FEW else f"too few ({at['others']})"
        ),
    }
    return Table(
        ("threshold", *(f"{m}{t}" if t[0] == ":" else t for m in models for t in lines)),
        [
            (at, *(told(t, m["thresholds"][n]) for m in models.values() for t in lines.values()))
            for n, at in enumerate(levels)
        ],
    )


def arrivals() -> Table:
    """The engine at full depth against static batches, requests coming when they like."""

    def seconds(of: Value) -> str:
        return ", ".join(f"{of[p]:.1f}" for p in ("p50", "p95")) + " s"

    measured = {k: f["arrivals"] for k, f in record("engine").items() if "arrivals" in f}
    columns = (
        "", "tokens a second", "over static", "rows busy", "first token p50, p95", "answer p50, p95"
    )  # fmt: skip
    return Table(
        columns,
        [
            (
                f"{key}, {way}",
                f"{of[way]['tokens_per_second']:.0f}",
                bold(times(of["measured"])) + f" ({of['predicted']:.2f} predicted)"
                if way == "engine"
                else "1.00x",
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

    def exits(way: Value) -> str:
        """Over full depth in the same slots: what exits alone gain."""
        where, _, mode = way["way"].rpartition(", ")
        if mode not in ("early_exit", "lossless"):
            return ""
        full = by(way["ways"], "way")[f"{where}, full"]
        return times(way["captions_per_second_decode"] / full["captions_per_second_decode"])

    runs = _figures("photographs").items()
    return Table.of(
        [{**run, **way, "run": name} for name, run in runs for way in run["ways"]],
        {
            "": lambda way: f"{way['run']}, {way['way'].replace('_', ' ')}",
            "captions a second, end to end": speed,
            "decoding alone": partial(speed, what="_decode"),
            "of it by exits": exits,
            "as a single request's": "{as_alone} of {photographs}",
            "CIDEr": "{cider:.3f}",
        },
    )


def single() -> Table:
    """Decoding speed of single captions: what the products gain at full depth, and what exits gain
    over that, at each threshold."""
    rows = []
    for dtype, run in _figures("single").items():
        speeds = {name: way["speedup"] for name, way in run["ways"].items()}
        for threshold in (n.split()[2] for n in speeds if n.startswith("early")):
            for weights in ("", "prepacked ", "compiled "):
                full = speeds[f"{weights}full"]
                guesses = (n for n in speeds if n.startswith(f"{weights}guesses {threshold} "))
                best = max(guesses, key=lambda name: speeds[name])
                ways = [f"{weights}early exit {threshold}", f"{weights}lossless", best]
                rows.append(
                    (
                        f"{dtype}, {threshold}",
                        weights.strip() or "plain",
                        times(full),
                        *(times_with_range(run["ways"][way]["over_own"]) for way in ways),
                        bold(times(max(speeds[way] for way in ways))),
                        f"{run['ways'][best]['same']} of {run['photographs']}",
                    )
                )
    columns = (
        "threshold", "products", "full depth", "exits: early exit", "exits: lossless",
        "exits: with guesses", "both, fastest", "same answers",
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
    "memory-requests": lambda: f"{sum(_figures('memory')[n] for n in ('answered', 'cancelled')):,}",
    "memory-first": lambda: f"{_memory()[0]['memory_mib']:.0f}",
    "memory-last": lambda: f"{_memory()[-1]['memory_mib']:.0f}",
    "memory-tensors": lambda: _range("tensors"),
    "memory-objects": lambda: _range("objects"),
}
