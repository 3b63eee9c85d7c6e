"""Tables of serving: the watched guarantee's simulation, and what HTTP leaves of the engine."""

from offramp.report.table import Table, Told
from offramp_lab.tables.markdown import MakeTable, Value, by, record


def milliseconds(of: Value, *percentiles: str) -> str:
    return ", ".join(f"{1000 * of[p]:.0f}" for p in percentiles) + " ms"


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


def http() -> Table:
    measured = record("serving")["http"].items()
    return Table.of(
        [
            {**entry, "model": name}
            for name, of in measured
            for entry in of["entries"]
            if entry["clients"] in (8, 32)
        ],
        {
            "model": "{model}",
            "clients": "{clients}",
            "mode": lambda of: of["mode"].replace("_", " "),
            "tokens a second": "{tokens_per_second:.0f}",
            "of the engine's": "{share:.2f}",
            "first token p50, p95": lambda of: milliseconds(of["first"], "p50", "p95"),
        },
    )


TABLES: dict[str, MakeTable] = {
    "watched": watched,
    "watch-delays": watch_delays,
    "watch-average": watch_average,
    "serving": http,
}
