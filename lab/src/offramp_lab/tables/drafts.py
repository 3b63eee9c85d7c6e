"""Lossless decoding by exits that draft on, beside a table of word triples."""

from collections.abc import Callable

from offramp.report.table import Table
from offramp_lab.tables.markdown import Make, MakeTable, Value, by, record

WAYS = {
    "exit, as stored": "exit, by its threshold",
    "table": "the table alone",
    "drafting, 4": "4 drafts",
    "drafting, 5": "5 drafts",
}


def drafts() -> Table:
    """Multiples of full depth by the same products, with their intervals; of each engine."""
    rows = []
    for part, entries in record("drafts").items():
        if part == "provenance":
            continue
        found = by(entries, "way")
        times = [
            f"{one['times']:.2f} [{one['low']:.2f}, {one['high']:.2f}]"
            for one in (found[way] for way in WAYS)
        ]
        four = found["drafting, 4"]
        right = " ".join(f"{share:.2f}"[1:] for share in four["acceptance"])
        same = min(found[way]["identical"] for way in WAYS)
        rows.append(
            (
                part.replace("pytorch", "PyTorch"), f"{found['full']['speed']:.0f}", *times,
                f"{four['times'] / found['table']['times']:.2f}", right,
                f"{four['first_draft']:.2f}", f"{four['tokens_a_round']:.2f}",
                f"{same} of {four['photographs']}",
            )
        )  # fmt: skip
    return Table(
        (
            "", "full depth, tokens/CPU s", *WAYS.values(), "4 drafts over the table",
            "each of 4 right", "first of an answer", "tokens a round", "identical",
        ),
        rows,
    )  # fmt: skip


def way(part: str, name: str = "drafting, 4") -> Value:
    """What the record has of one way to the full model's answer, in a part."""
    return by(record("drafts")[part], "way")[name]


def _times(part: str) -> Callable[[], str]:
    return lambda: f"{way(part)['times']:.2f}"


TABLES: dict[str, MakeTable] = {"drafts": drafts}
FIGURES: dict[str, Make] = {
    "drafts-packed": _times("pytorch float32, packed"),
    "drafts-f16": _times("llama.cpp f16"),
    "drafts-q8_0": _times("llama.cpp q8_0"),
}
