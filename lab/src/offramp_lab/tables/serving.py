"""Tables of serving: the batch engine against a static batch, the watched guarantee's simulation,
and what HTTP leaves of the engine."""

from collections.abc import Mapping
from typing import Any

from offramp_lab.places import RECORDS
from offramp_lab.tables.markdown import Make, bold, record, table, times

WATCHED = ("promised", "called broken though it holds", "twice the risk", "3 times", "10 times")
HTTP = (
    "model", "clients", "mode", "tokens a second", "of the engine's", "first token p50, p95",
    "gap p50",
)  # fmt: skip


ENGINE = (
    "shape", "case", "of a static batch (of a prepacked one)",
    "of its own full depth: predicted", "measured", "gaps p50, p95, p99",
)  # fmt: skip


def engine() -> str:
    """Throughput with scripted exits on random weights, and the gaps between a row's tokens; fewer
    slots than 8 are drawn (`offramp_lab.pages.plots`)."""
    rows = [
        (
            name,
            entry["name"].partition(": ")[2],
            bold(times(entry["against_static"])) + _of_prepacked(entry),
            times(entry["predicted"]),
            times(entry["measured"]) + ("" if entry["within"] else " (off by more than 10%)"),
            ", ".join(f"{1000 * entry[p]:.0f}" for p in ("p50", "p95", "p99")) + " ms",
        )
        for name, figures in record("engine").items()
        if name != "provenance"
        for entry in figures["entries"]
        if entry["slots"] >= 8
    ]
    return table(rows, ENGINE)


def _of_prepacked(entry: Mapping[str, Any]) -> str:
    """Against a static batch of the same prepacked weights."""
    against = entry.get("against_static_prepacked")
    return "" if against is None else f" ({times(against)})"


def watched() -> str:
    """False alarms, and images until a broken promise is noticed, by how much it is exceeded."""
    measured = record("watched")
    rows = []
    for entry in measured["entries"]:
        false = f"{entry['false_alarms']:.2%} of {entry['streams']} over {entry['images']} images"
        delays = [_delay(entry["delays"][ratio]) for ratio in ("2", "3", "10")]
        rows.append((f"at most {entry['target']:.2%}", false, *delays))
    return table(rows, WATCHED)


def _delay(delay: Mapping[str, Any]) -> str:
    return f"{delay['median_images']:.0f} (p95 {delay['p95_images']:.0f}) images"


def http() -> str:
    """Empty until it was measured."""
    if not (RECORDS / "serving.json").is_file() or "http" not in (measured := record("serving")):
        return ""
    rows = [
        (
            name,
            str(entry["clients"]),
            entry["mode"].replace("_", " "),
            f"{entry['tokens_per_second']:.0f}",
            f"{entry['share']:.2f}",
            f"{1000 * entry['first']['p50']:.0f}, {1000 * entry['first']['p95']:.0f} ms",
            f"{1000 * entry['gap']['p50']:.1f} ms",
        )
        for name, figures in measured["http"].items()
        for entry in figures["entries"]
    ]
    return table(rows, HTTP)


TABLES: dict[str, Make] = {"engine": engine, "watched": watched, "serving": http}
