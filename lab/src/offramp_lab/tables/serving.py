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


def watch_delays() -> str:
    """Images until a risk that rises is noticed, by how many good ones came before; in brackets
    without new starts."""
    found = record("watched")["delays"]
    afters = list(dict.fromkeys(row["after"] for row in found))
    columns = list(dict.fromkeys(row["times"] for row in found))

    def cell(after: int, times: float) -> str:
        with_starts, without = (
            next(
                row
                for row in found
                if (row["after"], row["times"], row["new_starts"]) == (after, times, starts)
            )
            for starts in (True, False)
        )
        return f"{_median(with_starts)} ({_median(without)})"

    rows = [(f"{after:,}", *(cell(after, times) for times in columns)) for after in afters]
    return table(rows, ("good images before", *(f"{times:g} times the risk" for times in columns)))


def _median(row: Mapping[str, Any]) -> str:
    if row["noticed"] < 0.5:
        return f"noticed in {row['noticed']:.0%} within {row['within']:,}"
    missed = "" if row["noticed"] > 0.995 else f", in {row['noticed']:.0%}"
    return f"{row['median_images']:,.0f}{missed}"


def watch_average() -> str:
    """Alarms where the promise holds on average alone, by slack."""
    found = record("watched")["on_average"]
    kinds = list(dict.fromkeys((row["kind"], row["words"]) for row in found))
    slacks = list(dict.fromkeys(row["slack"] for row in found))
    alarms = {(row["kind"], row["slack"]): f"{row['alarms']:.0%}" for row in found}
    rows = [(words, *(alarms[kind, slack] for slack in slacks)) for kind, words in kinds]
    return table(rows, ("risk", *(f"slack {slack}" for slack in slacks)))


def watch_coverage() -> str:
    """Watched requests that are compared under load."""
    rows = [
        (
            f"{row['busy']} of {row['slots']}, {row['waiting']} waiting",
            f"{row['compared_before']} of {row['requests']}",
            f"{row['compared']} of {row['requests']}",
        )
        for row in record("watched")["coverage"]
    ]
    return table(rows, ("slots in use", "compared before", "compared now"))


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


TABLES: dict[str, Make] = {
    "engine": engine,
    "watched": watched,
    "watch-delays": watch_delays,
    "watch-average": watch_average,
    "watch-coverage": watch_coverage,
    "serving": http,
}
