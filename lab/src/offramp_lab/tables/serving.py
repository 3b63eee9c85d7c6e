"""Tables of serving: the batch engine against a static batch, the watched guarantee's simulation,
and what HTTP leaves of the engine."""

from offramp.report.html import times
from offramp.report.table import Table
from offramp_lab.tables.markdown import MakeTable, Value, bold, record


def milliseconds(of: Value, *percentiles: str, digits: int = 0) -> str:
    return ", ".join(f"{1000 * of[p]:.{digits}f}" for p in percentiles) + " ms"


def engine() -> Table:
    """Throughput with scripted exits on random weights, and the gaps between a row's tokens; fewer
    slots than 8 are drawn (`offramp_lab.pages.plots`)."""
    cases = [
        (name, entry)
        for name, figures in record("engine").items()
        if name != "provenance"
        for entry in figures["entries"]
        if entry["slots"] >= 8
    ]
    return Table.of(
        cases,
        {
            "shape": lambda of: of[0],
            "case": lambda of: of[1]["name"].partition(": ")[2],
            "of a static batch (of a prepacked one)": lambda of: (
                bold(times(of[1]["against_static"])) + _of_prepacked(of[1])
            ),
            "of its own full depth: predicted": lambda of: times(of[1]["predicted"]),
            "measured": lambda of: (
                times(of[1]["measured"]) + ("" if of[1]["within"] else " (off by more than 10%)")
            ),
            "gaps p50, p95, p99": lambda of: milliseconds(of[1], "p50", "p95", "p99"),
        },
    )


def _of_prepacked(entry: Value) -> str:
    """Against a static batch of the same prepacked weights."""
    against = entry.get("against_static_prepacked")
    return "" if against is None else f" ({times(against)})"


def watched() -> Table:
    """False alarms, and images until a broken promise is noticed, by how much it is exceeded."""

    def delay(entry: Value, ratio: str) -> str:
        of = entry["delays"][ratio]
        return f"{of['median_images']:.0f} (p95 {of['p95_images']:.0f}) images"

    return Table.of(
        record("watched")["entries"],
        {
            "promised": lambda e: f"at most {e['target']:.2%}",
            "called broken though it holds": lambda e: (
                f"{e['false_alarms']:.2%} of {e['streams']} over {e['images']} images"
            ),
            "twice the risk": lambda e: delay(e, "2"),
            "3 times": lambda e: delay(e, "3"),
            "10 times": lambda e: delay(e, "10"),
        },
    )


def http() -> Table:
    measured = [(n, e) for n, of in record("serving")["http"].items() for e in of["entries"]]
    return Table.of(
        measured,
        {
            "model": lambda of: of[0],
            "clients": lambda of: str(of[1]["clients"]),
            "mode": lambda of: of[1]["mode"].replace("_", " "),
            "tokens a second": lambda of: f"{of[1]['tokens_per_second']:.0f}",
            "of the engine's": lambda of: f"{of[1]['share']:.2f}",
            "first token p50, p95": lambda of: milliseconds(of[1]["first"], "p50", "p95"),
            "gap p50": lambda of: milliseconds(of[1]["gap"], "p50", digits=1),
        },
    )


TABLES: dict[str, MakeTable] = {"engine": engine, "watched": watched, "serving": http}
