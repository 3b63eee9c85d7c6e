"""Tables of serving: the batch engine against a static batch, the watched guarantee's simulation,
and what HTTP leaves of the engine."""

from offramp.report.html import times
from offramp.report.table import Table, Told
from offramp_lab.tables.markdown import Make, MakeTable, Value, bold, by, record


def milliseconds(of: Value, *percentiles: str, digits: int = 0) -> str:
    return ", ".join(f"{1000 * of[p]:.{digits}f}" for p in percentiles) + " ms"


def engine() -> Table:
    """Throughput with scripted exits on random weights, and the gaps between a row's tokens; fewer
    slots than 8 are drawn (`offramp_lab.pages.plots`)."""
    cases = [
        {**entry, "shape": name}
        for name, figures in record("engine").items()
        if name != "provenance"
        for entry in figures["entries"]
        if entry["slots"] >= 8
    ]
    return Table.of(
        cases,
        {
            "shape": "{shape}",
            "case": lambda of: of["name"].partition(": ")[2],
            "over a static batch (a prepacked one)": lambda of: (
                bold(times(of["against_static"])) + _of_prepacked(of)
            ),
            "exits: predicted": "{predicted:.2f}x",
            "exits: measured": lambda of: (
                times(of["measured"]) + ("" if of["within"] else " (off by more than 10%)")
            ),
            "gaps p50, p95, p99": lambda of: milliseconds(of, "p50", "p95", "p99"),
        },
    )


def _of_prepacked(entry: Value) -> str:
    """Against a static batch of the same prepacked weights."""
    against = entry.get("against_static_prepacked")
    return "" if against is None else f" ({times(against)})"


def watched() -> Table:
    """False alarms, and images until a broken promise is noticed, by how much it is exceeded."""

    def delay(ratio: str) -> Told:
        return lambda entry: "{median_images:.0f} (p95 {p95_images:.0f}) images".format_map(
            entry["delays"][ratio]
        )

    return Table.of(
        record("watched")["entries"],
        {
            "promised": "at most {target:.2%}",
            "called broken though it holds": "{false_alarms:.2%} of {streams} over {images} images",
            "twice the risk": delay("2"),
            "3 times": delay("3"),
            "10 times": delay("10"),
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
            "slots in use": "{busy} of {slots}, {waiting} waiting",
            "compared before": "{compared_before} of {requests}",
            "compared now": "{compared} of {requests}",
        },
    )


def http() -> Table:
    measured = record("serving")["http"].items()
    return Table.of(
        [{**entry, "model": name} for name, of in measured for entry in of["entries"]],
        {
            "model": "{model}",
            "clients": "{clients}",
            "mode": lambda of: of["mode"].replace("_", " "),
            "tokens a second": "{tokens_per_second:.0f}",
            "of the engine's": "{share:.2f}",
            "first token p50, p95": lambda of: milliseconds(of["first"], "p50", "p95"),
            "gap p50": lambda of: milliseconds(of["gap"], "p50", digits=1),
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
