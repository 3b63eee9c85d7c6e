"""Every image-text-to-text type of transformers: what offramp does with a tiny one."""

from __future__ import annotations

from offramp.report.table import Table
from offramp_lab.tables.markdown import Make, MakeTable, Value, record

UNTRIED = {
    "Unrecognized configuration class": "the auto class of transformers does not take its config",
    "": "a tiny model of it does not run in its own code",
}
"""Why there is no tiny model of a type, by what its code raised."""
COLUMNS = {
    "plain": "without exits",
    "exits": "exits",
    "first_token": "first token early",
    "lossless": "lossless",
}
ENGINES = {"slots": "slots", "stack": "its own forward", None: "refused"}
"""What decodes a type, from its first prompt on: the engine that was found to write its tokens."""


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
    """A row for each type; the record keeps what the code of those raised that are not tried."""
    rows = []
    for name, outcome in record("models")["types"].items():
        stack = f"`{outcome['paths'][0]}`" if "paths" in outcome else ""
        if reason := why(outcome):
            rows.append((name, stack, reason, *[""] * 4))
            continue
        stack += " (registered)" if outcome["registered"] else ""
        engine = ENGINES[outcome.get("engine")]
        rows.append((name, stack, *(verdict(outcome, column) for column in COLUMNS), engine))
    return Table(("type", "decoder stack", *COLUMNS.values(), "engine"), rows)


TABLES: dict[str, MakeTable] = {"models": models}
FIGURES: dict[str, Make] = {
    "models-types": lambda: str(len(record("models")["types"])),
    "models-exact": lambda: str(sum(row[2] == row[3] == "exact" for row in models().rows)),
}
