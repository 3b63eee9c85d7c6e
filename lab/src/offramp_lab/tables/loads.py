"""Tables of the batch engine under loads like those of use."""

from functools import partial

from offramp.report.html import times
from offramp.report.table import Table
from offramp_lab.tables.markdown import MakeTable, Value, by, record


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

    runs = ((name, run) for name, run in record("loads").items() if name != "provenance")
    return Table.of(
        [
            {**run, **way, "run": name}
            for name, run in runs
            for way in run["ways"]
            if "generate" not in way["way"]
        ],
        {
            "": lambda way: f"{way['run']}, {way['way'].replace('_', ' ')}",
            "captions a second, end to end": speed,
            "decoding alone": partial(speed, what="_decode"),
            "of it by exits": exits,
            "as a single request's": "{as_alone} of {photographs}",
            "CIDEr": "{cider:.3f}",
        },
    )


TABLES: dict[str, MakeTable] = {"photographs-at-once": photographs}
