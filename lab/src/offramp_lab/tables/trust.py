"""Trust beside thresholds: speed against changed answers, and what was taken and differs."""

from collections import Counter
from functools import partial

from offramp_lab.tables.markdown import Make, Value, record, times_with_range, with_range

ENGINES = {"torch": "PyTorch", "llama.cpp q8_0": "q8_0"}


def by_way() -> dict[str, dict[str, list[Value]]]:
    """By engine, the entries of trust with lossless before it, and those of thresholds; the
    slowest first."""
    found: dict[str, dict[str, list[Value]]] = {}
    for engine, title in ENGINES.items():
        own = [entry for entry in record("trust")["entries"] if entry["engine"] == engine]
        found[title] = {
            way: sorted((e for e in own if e["way"].startswith(names)), key=lambda e: e["changed"])
            for way, names in {
                "trust": ("lossless", "trust"),
                "thresholds": ("thresholds",),
            }.items()
        }
    return found


def _of(engine: str, way: str) -> Value:
    for entry in record("trust")["entries"]:
        if (entry["engine"], entry["way"]) == (engine, way):
            return dict(entry)
    raise KeyError(engine, way)


def _speed(entry: Value) -> str:
    return times_with_range(entry["whole"])


def _changed(entry: Value) -> str:
    return f"{entry['changed']:.0%}"


def _cider(entry: Value) -> str:
    difference = entry["CIDEr"] - _of(entry["engine"], "full")["CIDEr"]
    return with_range(f"{difference:+.3f}", entry["difference"], "+.3f")


def _judged(whose: str) -> str:
    """How many of the answers that were read are right, partly right, and wrong."""
    counts = Counter(one["judged"][whose] for one in record("trust")["taken"])
    return ", ".join(f"{counts[name]} {name}" for name in ("right", "partly", "wrong"))


def _even(engine: str) -> str:
    """The share of changed answers from which thresholds are as fast as lossless decoding."""
    found = record("trust")["even"][engine]
    return with_range(f"{found['changed']:.1%}", (found["low"], found["high"]), ".1%")


WHAT = {"speed": _speed, "changed": _changed, "cider": _cider}
FIGURES: dict[str, Make] = {
    **{
        f"trust-even-{engine}".replace(" ", "-"): partial(_even, engine)
        for engine in record("trust").get("even", ())
    },
    **{f"trust-judged-{whose}": partial(_judged, whose) for whose in ("taken", "full")},
    **{
        f"trust-{what}-{entry['engine']}-{entry['way']}".replace(" ", "-"): partial(make, entry)
        for what, make in WHAT.items()
        for entry in record("trust")["entries"]
    },
}
