"""Trust beside thresholds: speed against changed answers, and what was taken and differs."""

from collections import Counter
from functools import partial

from offramp_lab.tables.markdown import Make, Value, by, record, with_range

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


def _difference() -> str:
    """How far CIDEr is from full depth's at the level of trust that the page tells of."""
    found = by((e for e in record("trust")["entries"] if e["engine"] == "torch"), "way")
    ours, full = found["trust 0.1"], found["full"]
    return with_range(f"{ours['CIDEr'] - full['CIDEr']:+.3f}", ours["difference"], "+.3f")


def _judged(whose: str) -> str:
    """How many of the answers that were read are right, partly right, and wrong."""
    counts = Counter(one["judged"][whose] for one in record("trust")["taken"])
    return ", ".join(f"{counts[name]} {name}" for name in ("right", "partly", "wrong"))


FIGURES: dict[str, Make] = {
    **{f"trust-judged-{whose}": partial(_judged, whose) for whose in ("taken", "full")},
    "trust-difference": _difference,
}
