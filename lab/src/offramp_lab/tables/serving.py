"""Tables of serving: the watched guarantee's simulation, what HTTP leaves of the engine, and what
answers at once take."""

from offramp.core.decoding.policy import MODES
from offramp.report.table import Table, Told
from offramp_lab.tables.markdown import MakeTable, Value, by, multiple, record


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
        [entry for entry in record("serving")["tiny-opt"]["entries"] if entry["clients"] == 8],
        {
            "mode": lambda of: of["mode"].replace("_", " "),
            "tokens a second": "{tokens_per_second:.0f}",
            "of the engine's": "{share:.2f}",
            "first token p50, p95": lambda of: milliseconds(of["first"], "p50", "p95"),
        },
    )


def batches() -> Table:
    """CPU milliseconds a caption by engine, answers at once and mode, beside full depth's of the
    same load."""
    entries = record("batches")["entries"]
    told = by(entries, "engine", "at_once", "mode")
    rows = dict.fromkeys((entry["engine"], entry["at_once"]) for entry in entries)

    def cell(row: tuple[str, int], mode: str) -> str:
        entry = told[*row, mode]
        took = f"{entry['milliseconds']:.0f}"
        return took if mode == "full" else f"{took} ({multiple(entry['over_full'])})"

    return Table.grid(
        {f"{engine}, {slots}": (engine, slots) for engine, slots in rows},
        {mode.replace("_", " "): mode for mode in MODES},
        cell,
        "engine, at once",
    )


TABLES: dict[str, MakeTable] = {"watched": watched, "serving": http, "batches": batches}
