"""Lossless decoding by exits that draft on, beside a table of word triples."""

from collections.abc import Callable, Iterator

from offramp.report.table import Table
from offramp_lab.tables.markdown import Make, MakeTable, Value, by, record, times_with_range

WAYS = {
    "exit, as stored": "one draft of the exit",
    "table": "table of word triples",
    "drafting, 4": "4 drafts",
    "drafting, 5": "5 drafts",
}
SHIPS = "drafting, 5"


def drafts() -> Table:
    """Speedups over the same model and kernels with exits off, with intervals, by engine."""
    rows = []
    for part, found in _parts():
        times = [times_with_range(found[way]) if way in found else "" for way in WAYS]
        tokens = f"{found[SHIPS]['tokens_a_round']:.2f}"
        rows.append((part, f"{found['full']['speed']:.0f}", *times, tokens))
    titles = ("exits off, tokens/CPU s", *WAYS.values(), "tokens a round, 5 drafts")
    return Table(("", *titles), rows)


def same() -> str:
    """The least number of answers that are the full model's, of all ways and engines."""
    ways = [one for _, found in _parts() for one in found.values()]
    return f"{min(one['identical'] for one in ways)} of {ways[0]['photographs']}"


def acceptance(part: str) -> Callable[[], str]:
    """Acceptance of draft k, given that the drafts before it were accepted."""
    return lambda: ", ".join(f"{share:.2f}" for share in way(part)["acceptance"])


def _parts() -> Iterator[tuple[str, dict[str, Value]]]:
    """Each engine, and what the record has of it by way."""
    for part, entries in record("drafts").items():
        if part != "provenance" and "iq4_nl" not in part:
            yield part.replace("pytorch", "PyTorch"), by(entries, "way")


def way(part: str, name: str = SHIPS) -> Value:
    """What the record has of one way to the full model's answer, in a part."""
    return by(record("drafts")[part], "way")[name]


def _times(part: str, name: str = SHIPS) -> Callable[[], str]:
    return lambda: f"{way(part, name)['times']:.2f}"


TABLES: dict[str, MakeTable] = {"drafts": drafts}
FIGURES: dict[str, Make] = {
    "drafts-same": same,
    "drafts-right": acceptance("pytorch float32"),
    "drafts-right-q4_1": acceptance("llama.cpp q4_1"),
    "drafts-q4_1": _times("llama.cpp q4_1", "drafting, 4"),
    "drafts-iq4_nl": _times("llama.cpp iq4_nl", "drafting, 4"),
    "drafts-for-q4_1": _times("llama.cpp q4_1, exits for it", "drafting, 4"),
    "drafts-for-iq4_nl": _times("llama.cpp iq4_nl, exits for it", "drafting, 4"),
}
