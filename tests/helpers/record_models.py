"""Every image-text-to-text type of transformers, tiny: what offramp does with it.

    python tests/helpers/record_models.py  # run all types, keep the record
    python -m offramp_lab.pages.readme     # the table of docs/models-results.md

A type is built with random weights (`zoo`), loaded with one prompt with an image, and decoded with
exits at two depths beside its own `generate`, batch 1 and 3: part 3 of the self-check
(`offramp.features.self_check`), logits and tokens. Then its engine is found, as at the first prompt
that anybody asks.
"""

from __future__ import annotations

import sys
import warnings
from importlib.metadata import version
from typing import Any

from offramp.core.storage import write_json
from offramp_lab.records.record import Record, asked

RECORD = Record("models", "tests/helpers/record_models.py")
COLUMNS = ("plain", "exits", "first_token", "lossless")
"""Parts of what the self-check finds."""


def main() -> None:
    arguments = asked(
        str(__doc__).splitlines()[0],
        more=lambda parser: parser.add_argument("types", nargs="*", help="run these alone"),
    )
    record = RECORD.read() or {"types": {}}
    record["transformers"] = version("transformers")
    for name, outcome in run(arguments.types):
        record["types"][name] = outcome
        write_json(RECORD.path, record)


def run(types: list[str]) -> Any:
    """(type, what was found) of each type, in the order of transformers."""
    warnings.filterwarnings("ignore")
    import torch
    import zoo

    from offramp.core.decoding.policy import ExitPolicy
    from offramp.core.engine.generate import generate
    from offramp.core.errors import OfframpError
    from offramp.core.models.backbone import Backbone
    from offramp.core.models.exits import Exits
    from offramp.core.models.registry import registered_family
    from offramp.features.self_check import check_decoding

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
            exits = Exits(whole, (2, 4)).requires_grad_(False)
            policy, inputs = ExitPolicy({2: 0.5, 4: 0.5}), zoo.inputs(name, model, 1)
            generate(whole, inputs, exits=exits, policy=policy, max_new_tokens=10)
            outcome["engine"] = "own" if whole.readings.failed else whole.engine
        except OfframpError as error:
            outcome["engine_refused"] = error.problem
        yield name, outcome
        print(name, outcome, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
