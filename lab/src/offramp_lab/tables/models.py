"""Every image-text-to-text type of transformers: what offramp does with a tiny one."""

from __future__ import annotations

from functools import partial

from offramp.report.table import Table
from offramp_lab.tables.markdown import Make, MakeTable, Value, record

UNTRIED = {
    "Unrecognized configuration class": "the auto class of transformers does not take its config",
    "": "a tiny model of it does not run in its own code",
}
"""Why there is no tiny model of a type, by what its code raised."""
COLUMNS = ("plain", "exits", "first_token", "lossless")
"""What was compared of each type."""


def verdict(outcome: Value, column: str) -> str:
    """exact, no, or refused, in both batches."""
    # What is not exact is measured where it matters: the first token then runs whole, lossless is
    # refused, and with exits the model is.
    outcomes = [outcome[rows][column] for rows in ("1", "3")]
    if all(isinstance(o, float) and o <= outcome["allowed"] for o in outcomes):
        return "exact"
    return {"first_token": "never", "lossless": "refused"}.get(column, "no")


def why(outcome: Value) -> str:
    """Why a type is refused, or not tried; empty: it is not."""
    if "not_built" in outcome:
        said = next(words for raised, words in UNTRIED.items() if raised in outcome["not_built"])
        return f"not tried: {said}"
    if "refused" in outcome:
        return f"refused: {outcome['refused']}".replace("|", "/")
    if "no" not in (verdict(outcome, "plain"), verdict(outcome, "exits")):
        return ""
    found = [outcome[rows][column] for rows in ("1", "3") for column in ("plain", "exits")]
    off = max((o for o in found if isinstance(o, float)), default=0.0)
    if off > outcome["allowed"]:
        return f"refused by check 3: where tokens exit, later logits are off by {off:.0e}"
    return "refused by check 3: its own code fails when skipped layers are filled in later"


def models() -> Table:
    """The types that are not decoded with exits, and why; the record keeps what code raised."""
    rows = [(name, reason) for name, outcome in _types() if (reason := why(outcome))]
    return Table(("type", "why"), rows)


def _types() -> list[tuple[str, Value]]:
    return list(record("models")["types"].items())


def _exact(name: str = "exits", said: str = "exact", engine: str = "") -> str:
    """The types that are decoded with exits and of which a column says so, by the engine."""
    return ", ".join(
        kind
        for kind, outcome in _types()
        if not why(outcome)
        and verdict(outcome, name) == said
        and engine in ("", outcome.get("engine"))
    )


TABLES: dict[str, MakeTable] = {"models-refused": models}
FIGURES: dict[str, Make] = {
    "models-types": lambda: str(len(_types())),
    "models-exact": lambda: str(len(_exact().split(", "))),
    "models-slots": partial(_exact, engine="slots"),
    "models-forward": partial(_exact, engine="stack"),
    "models-whole-prompt": partial(_exact, "first_token", "never"),
    "models-no-drafts": partial(_exact, "lossless", "refused"),
}
