"""Prompts of many visual tokens: waiting at an exit, and tokens that stay behind there."""

from collections.abc import Callable
from functools import partial
from typing import Any

from offramp.report.table import Table, told
from offramp_lab.tables.markdown import Make, MakeTable, Value, record, with_range

PHOTOGRAPHS = "photographs"


def _shapes() -> dict[str, Value]:
    others = (PHOTOGRAPHS, "provenance")
    return {name: v for name, v in record("visual_tokens").items() if name not in others}


def _part(shape: str, part: str, **which: Any) -> Any:
    """What the record has of a part of an answer, in a shape's entry that has these values."""
    entries = _shapes()[shape]["entries"]
    return next(e[part] for e in entries if all(e[n] == value for n, value in which.items()))


def _speeds(part: str, deep: str) -> Table:
    """deep: which tokens go to the layers above the exit where any does."""
    shapes = _shapes()
    kept = sorted({e["keep"] for v in shapes.values() for e in v["entries"]}, reverse=True)
    rows = [
        (name, depth)
        for name, shape in shapes.items()
        for depth in sorted({e["depth"] for e in shape["entries"] if e["deep"] == deep} - {None})
    ]

    def column(**which: Any) -> Callable[[tuple[str, int]], str]:
        """Milliseconds, those that were predicted, and how many times as fast as full depth."""

        def cell(row: tuple[str, int]) -> str:
            of = _part(row[0], part, **{"depth": row[1], **which})
            return told("{milliseconds:,.0f} ({predicted:,.0f}), {over_full:.1f}x", of)

        return cell

    return Table.of(
        rows,
        {
            "": lambda row: f"{row[0]}, exit at {row[1]} of {shapes[row[0]]['layers']}",
            "full depth": column(depth=None),
            **{f"keep {keep:.0%}": column(deep=deep, keep=keep) for keep in kept},
            "no token deep": column(deep="none"),
        },
    )


def captions() -> Table:
    """What it costs in answers."""
    found = record("visual_tokens")[PHOTOGRAPHS]

    def ranged(entry: Value, name: str) -> str:
        chance = _BY[entry["ranking"]].startswith("chance")
        same = entry["keep"] == 1 or (name == "over_chance" and chance)
        return "" if same else with_range("", entry["as_full"][name], "+.3f").strip()

    return Table.of(
        found["entries"],
        {
            "": lambda e: _EXITS[e["thresholds"]],
            "visual tokens that go on": lambda e: (
                "all" if e["keep"] == 1 else f"{e['keep']:.0%} by {_BY[e['ranking']]}"
            ),
            "ROUGE-L with the full model's": "{as_full[value]:.3f}",
            "difference from where all go on": lambda e: ranged(e, "over_all"),
            "difference from chance": lambda e: ranged(e, "over_chance"),
            "ROUGE-L with people's, from full depth's": lambda e: with_range(
                f"{e['people']['value']:+.3f}", e["people"]["interval"], "+.3f"
            ),
        },
    )


_BY = {
    "attention": "attention",
    "random": "chance",
    "divprune": "DivPrune",
    "random-before": "chance before the decoder",
}
_EXITS = {"full depth": "no token exits", "shipped": "thresholds that ship"}


def _within() -> str:
    cells = [e[part] for v in _shapes().values() for e in v["entries"] for part in _PARTS]
    return f"{sum(cell['within'] for cell in cells)} of {len(cells)}"


_PARTS = ("first", "whole")

TABLES: dict[str, MakeTable] = {
    "visual-tokens-prompt": partial(_speeds, "first", "first"),
    "visual-tokens-answer": partial(_speeds, "whole", "first"),
    "visual-tokens-deep": partial(_speeds, "whole", "all"),
    "visual-tokens-captions": captions,
}
FIGURES: dict[str, Make] = {
    "visual-tokens-within": _within,
    "visual-tokens-waits": lambda: (
        f"{_part('llava-1b', 'whole', depth=2, deep='none')['over_full']:.1f}"
    ),
}
