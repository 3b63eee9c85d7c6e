"""Exits beside other ways to spare full depth, on one model, engine and set of photographs."""

from offramp.report.table import Table
from offramp_lab.tables.markdown import MakeTable, Value, record, times_with_range, with_range

WAYS = {
    "full": "full depth",
    "thresholds": "early exit by thresholds",
    "thresholds, untrained": "the same, untrained exit",
    "static": "every token at the exit",
    "exit drafts": "lossless: the exit drafts, as it ships",
    "exit drafts, untrained": "the same, untrained exit",
    "EAGLE-3": "lossless: EAGLE-3 drafts",
    "n-grams": "lossless: n-grams of the text",
}


def _of(name: str) -> dict[int, Value]:
    """A way's entries, by how many were written at once."""
    entries = record("side_by_side")["entries"]
    return {entry["at_once"]: entry for entry in entries if entry["way"] == name}


def side_by_side() -> Table:
    """Quality, and what the first token and each that follows take, by how many at once."""
    found = record("side_by_side")
    rows = []
    for name, title in WAYS.items():
        told = _of(name)
        one = told[1]
        rows.append(
            (
                title,
                f"{min(entry['identical'] for entry in told.values())} of {found['photographs']}",
                with_range(f"{one['minus_full']:+.3f}", one["difference"], "+.3f"),
                f"{one['tokens_a_round']:.2f}" if one["tokens_a_round"] else "",
                " / ".join(f"{entry['first_milliseconds']:,.0f}" for entry in told.values()),
                *(times_with_range(entry["over_full"]) for entry in told.values()),
            )
        )
    at_once = _of("full")
    numbers = " / ".join(map(str, at_once))
    titles = (
        "",
        "as full depth",
        "CIDEr, of full depth",
        "tokens a round",
        f"ms to the first token, {numbers} at once",
        *(f"a token, of full depth, {n} at once" for n in at_once),
    )
    return Table(titles, rows)


TABLES: dict[str, MakeTable] = {"side-by-side": side_by_side}
