"""Tables of serving: the batch engine against a static batch, the watched guarantee's simulation,
and what HTTP leaves of the engine."""

from offramp.report.html import times
from offramp.report.table import Table
from offramp_lab.tables.markdown import Make, MakeTable, Value, bold, by, record


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
            "over a static batch (a prepacked one)": lambda of: (
                bold(times(of[1]["against_static"])) + _of_prepacked(of[1])
            ),
            "exits: predicted": lambda of: times(of[1]["predicted"]),
            "exits: measured": lambda of: (
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


def watch_delays() -> Table:
    """Images until a risk that rises is noticed, by how many good ones came before; in brackets
    without new starts."""
    found = record("watched")["delays"]
    rows = by(found, "after", "times", "new_starts")

    def cell(after: int, times: float) -> str:
        with_starts, without = (_median(rows[after, times, starts]) for starts in (True, False))
        return f"{with_starts} ({without})"

    return Table.grid(
        {f"{row['after']:,}": row["after"] for row in found},
        {f"{row['times']:g} times the risk": row["times"] for row in found},
        cell,
        "good images before",
    )


def _median(row: Value) -> str:
    if row["noticed"] < 0.5:
        return f"noticed in {row['noticed']:.0%} within {row['within']:,}"
    missed = "" if row["noticed"] > 0.995 else f", in {row['noticed']:.0%}"
    return f"{row['median_images']:,.0f}{missed}"


def watch_average() -> Table:
    """Alarms where the promise holds on average alone, by slack."""
    found = record("watched")["on_average"]
    rows = by(found, "kind", "slack")
    return Table.grid(
        {row["words"]: row["kind"] for row in found},
        {f"slack {row['slack']}": row["slack"] for row in found},
        lambda kind, slack: f"{rows[kind, slack]['alarms']:.0%}",
        "risk",
    )


def watch_coverage() -> Table:
    """Watched requests that are compared under load."""
    return Table.of(
        record("watched")["coverage"],
        {
            "slots in use": lambda row: (
                f"{row['busy']} of {row['slots']}, {row['waiting']} waiting"
            ),
            "compared before": lambda row: f"{row['compared_before']} of {row['requests']}",
            "compared now": lambda row: f"{row['compared']} of {row['requests']}",
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


def _exact_batches(way: str) -> str:
    """Tokens that are not what they are alone, of all, in both precisions."""
    rows = [row for row in record("exact_batches")["entries"] if row["way"] == way]
    return f"{sum(r['tokens_differ'] for r in rows):,} of {sum(r['tokens'] for r in rows):,}"


def _exact_batches_cost() -> str:
    """How many times the CPU time of packed weights alone, least and most."""
    rates = by(record("exact_batches")["entries"], "precision", "way")
    costs = sorted(
        rates[p, "packed"]["tokens_per_cpu_second"] / rates[p, "exact"]["tokens_per_cpu_second"]
        for p in ("float32", "bfloat16")
    )
    return " to ".join(f"{cost:.2f}" for cost in costs)


TABLES: dict[str, MakeTable] = {
    "engine": engine,
    "watched": watched,
    "watch-delays": watch_delays,
    "watch-average": watch_average,
    "watch-coverage": watch_coverage,
    "serving": http,
}
FIGURES: dict[str, Make] = {
    "exact-batches-exact": lambda: _exact_batches("exact"),
    "exact-batches-packed": lambda: _exact_batches("packed"),
    "exact-batches-cost": _exact_batches_cost,
}
