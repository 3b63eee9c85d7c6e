"""Tables of the batch engine under loads like those of use."""

from functools import partial
from typing import Any

from offramp.report.html import times
from offramp.report.table import Table
from offramp_lab.tables.markdown import Make, MakeTable, Value, by, record


def _figures(part: str) -> Any:
    return record("loads")[part]["figures"]


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


def _memory() -> list[Value]:
    """What was held after the first looks, in which memory still settles."""
    looks = _figures("memory")["looks"]
    return list(looks[len(looks) // 4 :])


def _range(name: str) -> str:
    counts = [look[name] for look in _memory()]
    return " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)}))


TABLES: dict[str, MakeTable] = {"photographs-at-once": photographs}
FIGURES: dict[str, Make] = {
    "memory-requests": lambda: f"{sum(_figures('memory')[n] for n in ('answered', 'cancelled')):,}",
    "memory-first": lambda: f"{_memory()[0]['memory_mib']:.0f}",
    "memory-last": lambda: f"{_memory()[-1]['memory_mib']:.0f}",
    "memory-tensors": lambda: _range("tensors"),
    "memory-objects": lambda: _range("objects"),
}
