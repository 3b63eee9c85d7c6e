"""Exits for a language model most of whose weights are its head."""

from typing import Any

from offramp.report.table import Table
from offramp_lab.experiments.factors import DECODING, LOSSLESS, factors
from offramp_lab.tables.end_to_end import EARLY, FULL, MODES, PLAIN, SHORT
from offramp_lab.tables.markdown import Make, MakeTable, by, record, times_with_range

TITLES = {**MODES, EARLY: "early exit, 95% of tokens kept"}


def ways() -> Table:
    """Decoding in its factors, whole answers, and which are full depth's."""
    entries = record("gemma")["ways"]

    def cells(mode: str) -> tuple[str, ...]:
        things = [("", FULL), ("layers", mode)]
        if mode != LOSSLESS:
            things = [("", FULL), ("head", SHORT), *([] if mode == SHORT else [("layers", mode)])]
        chain = [(thing, (PLAIN, one, "")) for thing, one in things]
        found = factors(entries, chain, DECODING)
        entry = by(entries, "mode")[mode]
        parts = [f"{found[p]['times']:.2f}" if p in found else "" for p in ("head", "layers")]
        same = f"{entry['as_full']} of {len(entry['each']['tokens'].split())}"
        whole = times_with_range(entry["over_full"])
        return TITLES[mode], times_with_range(found["all"]), *parts, whole, same

    rows = [cells(entry["mode"]) for entry in entries if entry["mode"] != FULL]
    titles = ("decoding, of full depth", "by the head", "by layers skipped", "whole answers")
    return Table(("", *titles, "same as full depth"), rows)


def _agreement() -> str:
    """Of all tokens, and of those that repeat nothing."""
    found: dict[str, Any] = record("gemma")["agreement"]
    return " and ".join(f"{found[of]['agree']:.0%}" for of in ("all", "new"))


def _again() -> str:
    found = record("gemma")["agreement"]
    return f"{1 - found['new']['tokens'] / found['all']['tokens']:.0%}"


def _forecast() -> str:
    """The forecast's speeds while 95% of tokens stay, by depth."""
    told = record("gemma")["walk"][0]["said"]["depths"]
    return ", ".join(f"{one['speedup']['0.95']:.2f}" for one in told)


TABLES: dict[str, MakeTable] = {"gemma-ways": ways}
FIGURES: dict[str, Make] = {
    "gemma-agreement": _agreement,
    "gemma-again": _again,
    "gemma-forecast": _forecast,
}
