"""Tables of serving: the watched guarantee's simulation, and what HTTP leaves of the engine."""

from offramp.report.table import Table, Told
from offramp_lab.tables.markdown import MakeTable, Value, record


def milliseconds(of: Value, *percentiles: str) -> str:
    return ", ".join(f"{1000 * of[p]:.0f}" for p in percentiles) + " ms"


def watched() -> Table:
    """False alarms, and images until a broken promise is noticed, by how much it is exceeded."""

    def delay(ratio: str) -> Told:
        return lambda entry: "{median_images:,.0f} ({p95_images:,.0f})".format_map(
            entry["delays"][ratio]
        )

    return Table.of(
        record("watched")["entries"],
        {
            "promised": "at most {target:.2%}",
            "called broken though it holds": "{false_alarms:.2%}",
            "2 times the risk": delay("2"),
            "3 times": delay("3"),
            "10 times": delay("10"),
        },
    )


def http() -> Table:
    return Table.of(
        [
            {**entry, "model": name}
            for name in ("tiny-opt", "photo model")
            for entry in record("serving")[name]["entries"]
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


TABLES: dict[str, MakeTable] = {"watched": watched, "serving": http}
