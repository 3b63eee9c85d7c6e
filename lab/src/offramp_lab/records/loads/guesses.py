"""How often an exit is right where it is not confident enough to exit: what guesses are worth.

    python -m offramp_lab.records.loads.guesses                  # tiny-opt with the exits that ship
    python -m offramp_lab.records.loads.guesses --photo          # and the photo model

The full model's own greedy answers are read once more, and at each of their tokens the first exit
is asked what it would have said and how sure it is. Rewrites these models in
"guesses" of lab/records/loads.json; a minute, and a few more for 240 photographs. --t5: exits that
`offramp demo --backbone t5` trained.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from offramp.answers import full_model_answers
from offramp.calibration.replay import Array, PolicyReplay
from offramp.data.example import Example
from offramp_lab.records.loads import keep
from offramp_lab.records.record import asked
from offramp_lab.records.subjects import Subject, photo, tiny

THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)


def main() -> None:
    arguments = asked(__doc__, photo=False, dtype="float32", images=240, t5="")
    figures: dict[str, Any] = {}
    examples: list[Example] = []
    for subject in subjects(arguments):
        figures[subject.name] = measure(subject)
        examples += subject.examples
        print(subject.name, *figures[subject.name]["thresholds"], sep="\n  ", flush=True)
    keep("guesses", figures, examples)


def subjects(arguments: argparse.Namespace) -> Iterator[Subject]:
    yield tiny("opt", arguments.images)
    if arguments.t5:
        yield tiny("t5", arguments.images, Path(arguments.t5))
    if arguments.photo:
        yield photo(arguments, arguments.images, arguments.dtype)


def measure(subject: Subject) -> dict[str, Any]:
    """Of the first exit, over all tokens that may exit: by threshold the share that exits, the
    share of those that are the full model's, and of the others ("right", the guesses)."""
    adapter, encoder = subject.adapter, subject.encoder
    rows = full_model_answers(
        encoder, subject.examples, batch_size=16, max_new_tokens=subject.longest
    )
    replayed = PolicyReplay.of(encoder, adapter.exits, rows, adapter.policy, batch_size=16)
    tokens, depth = replayed.replay, adapter.exits.depths[0]
    may = tokens.mask.copy()
    may[:, 0] &= replayed.first
    scores, same = tokens.scores[depth][may], (tokens.said[depth] == tokens.final)[may]
    return {
        "depth": depth, "layers": tokens.layers, "images": len(rows), "tokens": len(same),
        "dtype": str(adapter.backbone.dtype).removeprefix("torch."),
        "agreement": float(same.mean()),
        "thresholds": [
            {
                "threshold": threshold, "exit": float(exits.mean()), "others": int((~exits).sum()),
                "right_of_exits": _share(same[exits]), "right": _share(same[~exits]),
            }
            for threshold in THRESHOLDS
            for exits in [scores >= threshold]
        ],
    }  # fmt: skip


def _share(which: Array) -> float | None:
    """Of nothing: None."""
    return float(which.mean()) if len(which) else None


if __name__ == "__main__":
    main()
