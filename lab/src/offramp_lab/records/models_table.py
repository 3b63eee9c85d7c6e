"""Every image-text-to-text type of transformers, tiny: what offramp does with it.

    python -m offramp_lab.records.models_table          # run all types, keep the record
    python -m offramp_lab.records.models_table --table  # rewrite the table alone

A type is built with random weights (`offramp_lab.inputs.zoo`), loaded with one prompt with an
image, and decoded with exits at two depths beside its own `generate`, batch 1 and 3: part 3 of the
self-check (`offramp.engine.self_check`), logits and tokens. Then its engine is found, as
at the first prompt that anybody asks.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import Any

from offramp_lab.places import DOCS, RECORDS

RECORD = RECORDS / "models.json"
PAGE = DOCS / "models-results.md"
START, END = "<!-- table: models -->", "<!-- end: models -->"
UNTRIED = {
    "Unrecognized configuration class": "the auto class of transformers does not take its config",
    "": "a tiny model of it does not run in its own code",
}
"""Why there is no tiny model of a type, by what its code raised."""
COLUMNS = ("plain", "exits", "first_token", "lossless")


ENGINES = {"slots": "slots", "stack": "its own forward", None: "refused"}
"""What decodes a type, from its first prompt on: the engine that was found to write its tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="rewrite the table alone")
    parser.add_argument("types", nargs="*", help="run these alone")
    arguments = parser.parse_args()
    from offramp.storage import read_json, write_json

    record = read_json(RECORD) if RECORD.is_file() else {"types": {}}
    if not arguments.table:
        import transformers

        record["transformers"] = transformers.__version__
        for name, outcome in run(arguments.types):
            record["types"][name] = outcome
            write_json(RECORD, record)
    text = PAGE.read_text(encoding="utf-8")
    before, _, following = text.partition(START)
    _, _, after = following.partition(END)
    PAGE.write_text(f"{before}{START}\n{table(record)}\n{END}{after}", encoding="utf-8")


def run(types: list[str]) -> Any:
    """(type, what was found) of each type, in the order of transformers."""
    warnings.filterwarnings("ignore")
    import torch

    from offramp.engine.self_check import check_decoding, prove
    from offramp.errors import OfframpError
    from offramp.models.backbone import Backbone
    from offramp.models.registry import registered_family
    from offramp_lab.inputs import zoo

    torch.set_num_threads(1)
    for name in types or zoo.names():
        outcome: dict[str, Any] = {}
        try:
            model = zoo.build(name)
            example = zoo.inputs(name, model, 1) if hasattr(model, "generate") else None
            if example is not None:
                with torch.inference_mode():
                    model.generate(**example, max_new_tokens=2, do_sample=False)
        except Exception as error:  # a type's own reasons, kept as they are
            yield name, {"not_built": f"{type(error).__name__}: {str(error)[:160]}"}
            continue
        try:
            whole = Backbone(model, example=example)
        except OfframpError as error:
            yield name, {"refused": error.problem}
            continue
        family = whole.family
        outcome["registered"] = registered_family(model.config) is not None
        outcome["paths"] = [family.stack, family.layers, family.norm, family.head]
        for rows in (1, 3):
            check = check_decoding(whole, zoo.inputs(name, model, rows), depths=(2, 4))
            outcome[str(rows)] = {column: getattr(check, column) for column in COLUMNS}
            outcome["allowed"] = check.allowed
        try:
            prove(whole, zoo.inputs(name, model, 1))
            outcome["engine"] = whole.engine
        except OfframpError as error:
            outcome["engine_refused"] = error.problem
        yield name, outcome
        print(name, outcome, file=sys.stderr, flush=True)


def verdict(outcome: dict[str, Any], column: str) -> str:
    """exact, no, or refused, in both batches."""
    # What is not exact is measured where it matters: the first token then runs whole, lossless is
    # refused, and with exits the model is.
    outcomes = [outcome[rows][column] for rows in ("1", "3")]
    if all(isinstance(o, float) and o <= outcome["allowed"] for o in outcomes):
        return "exact"
    return {"first_token": "never", "lossless": "refused"}.get(column, "no")


def why(outcome: dict[str, Any]) -> str:
    """Why a type is refused, or not tried; empty: it is not."""
    if "not_built" in outcome:
        said = next(words for raised, words in UNTRIED.items() if raised in outcome["not_built"])
        return f"not tried: {said}"
    if "refused" in outcome:
        return f"refused: {outcome['refused']}"
    if "no" not in (verdict(outcome, "plain"), verdict(outcome, "exits")):
        return ""
    found = [outcome[rows][column] for rows in ("1", "3") for column in ("plain", "exits")]
    off = max((o for o in found if isinstance(o, float)), default=0.0)
    if off > outcome["allowed"]:
        return f"refused by check 3: where tokens exit, later logits are off by {off:.0e}"
    return "refused by check 3: its own code fails when skipped layers are filled in later"


def table(record: dict[str, Any]) -> str:
    rows = []
    for name, outcome in record["types"].items():
        stack = f"`{outcome['paths'][0]}`" if "paths" in outcome else ""
        if reason := why(outcome):  # the record keeps what the type's own code raised
            rows.append((name, stack, reason, *[""] * 4))
            continue
        stack += " (registered)" if outcome["registered"] else ""
        engine = ENGINES[outcome.get("engine")]
        rows.append((name, stack, *(verdict(outcome, column) for column in COLUMNS), engine))
    exact = sum(row[2] == row[3] == "exact" for row in rows)
    head = (
        f"transformers {record['transformers']}: {len(rows)} types, {exact} exact without exits and"
        " with them.\n\n"
        "| type | decoder stack | without exits | exits | first token early | lossless | engine |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(
        "| " + " | ".join(c.replace("|", "/") for c in row) + " |" for row in rows
    )


if __name__ == "__main__":
    main()
