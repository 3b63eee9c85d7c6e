"""Exits beside other ways to spare full depth: one model, engine and set of photographs.

`python -m offramp_lab.records.side_by_side` needs photographs and onnxruntime, and first trains an
EAGLE-3 drafter on the full model's captions of the training split. All ways caption the same
photographs in the batch engine (PyTorch, float32, one thread), one at a time and several at once,
in turns. They are early exit by what ships, untrained exits at the same thresholds, and every token
at the exit; losslessly exits that draft on, untrained exits, EAGLE-3, and n-grams of the text. CPU
milliseconds to the first token (picture and vision tower included, and the prompts before it where
several come at once), and for each that follows. What was answered is kept in runs/side_by_side, so
that a run that was cut off goes on there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from examples.ngram_plugin import offramp_ngram
from examples.photo_vlm.evaluate import LONGEST
from examples.photo_vlm.rows import CAPTIONS
from offramp_vllm.exports.eagle3 import Eagle3Drafter

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import FULL
from offramp.core.models.exits import Exits
from offramp.evaluation.statistics import interval, mean_of
from offramp.evaluation.timing import decoding
from offramp.inputs.example import Example
from offramp_lab.experiments.experiment import same, times
from offramp_lab.experiments.factors import LOSSLESS
from offramp_lab.methods.eagle import NAME, load_drafter
from offramp_lab.places import RUNS
from offramp_lab.records.batched import Batched, answered
from offramp_lab.records.photographs.opened import EARLY, STATIC, TOWER, policy_of
from offramp_lab.records.photographs.told import scores
from offramp_lab.records.record import Group, Record, Turns, asked, words
from offramp_lab.records.subjects import halves, load_photo
from offramp_lab.records.text import step

RECORD = Record("side_by_side")
AT_ONCE = (1, 8, 32)


def ways_of(adapter: Adapter, drafter: Eagle3Drafter) -> dict[str, Batched]:
    """All ways by name."""
    exits = adapter.exits
    policy = {mode: policy_of(adapter, mode) for mode in (EARLY, STATIC, LOSSLESS)}
    untrained = partial(Exits, adapter.backbone, exits.depths)  # as training begins with them
    fresh, other = (
        replace(exits, modules=untrained(kind=kind).requires_grad_(False))
        for kind in ("layer", exits.modules.kind)
    )
    lossless = policy[LOSSLESS]
    none: dict[str, Any] = {"thresholds": {}, "first": {}}
    eagle = replace(lossless, drafts={NAME: 0.1}, max_draft=7, **none)
    ngram = replace(lossless, drafts={"ngram": 0.0}, max_draft=3, **none)
    return {
        "full": Batched(FULL),
        "early exit": Batched(policy[EARLY], exits),
        "early exit, untrained": Batched(policy[EARLY], fresh),
        "static": Batched(policy[STATIC], exits),
        "exit drafts": Batched(lossless, exits),
        "exit drafts, untrained": Batched(lossless, other),
        "EAGLE-3": Batched(eagle, None, drafter),
        "n-grams": Batched(ngram),
    }


def entries_of(
    told: Mapping[str, Sequence[Mapping[str, Any]]],
    at_once: int,
    examples: Sequence[Example],
    encoder: Any,
) -> list[dict[str, Any]]:
    """An entry for each way. over_full: how many times as fast decoding is; of drafts as `decoding`
    says."""
    entries = []
    took, rates = dict[str, Any](), dict[str, Any]()
    for name, rows in told.items():
        first, rest = (np.array([one[part] for one in rows]) for part in ("first", "rest"))
        took[name] = first + rest, rest
    for name, rows in told.items():
        drafts = any(one["rounds"] for one in rows)
        rest = decoding(took[name], took["full"]) if drafts else took[name][1]
        rates[name] = np.stack([np.array([len(one["ids"]) - 1.0 for one in rows]), rest])
    full = [one["ids"] for one in told["full"]]
    base = _cider(full, examples, encoder)
    for name, rows in told.items():
        ids = [one["ids"] for one in rows]
        own = mean_of(_cider(ids, examples, encoder))
        kept = [right for one in rows for _, right in one["rounds"]]
        entries.append(
            {
                "way": name,
                "at_once": at_once,
                "identical": same(ids, full),
                "CIDEr": own.value,
                "minus_full": own.value - mean_of(base).value,
                "difference": interval(own, minus=mean_of(base)),
                "first_milliseconds": 1e3 * float(np.mean([one["first"] for one in rows])),
                "token_milliseconds": 1e3 * float(rates[name][1].sum() / rates[name][0].sum()),
                "over_full": times(rates[name], rates["full"]),
                "tokens_a_round": 1 + float(np.mean(kept)) if kept else None,
            }
        )
    return entries


def _cider(ids: Sequence[Any], examples: Sequence[Example], encoder: Any) -> Sequence[float]:
    return scores("captions", encoder, ids, examples)["CIDEr"]


def export_words(work: Path, arguments: Any) -> list[str]:
    """What trains the drafter: captions of the training split, as much as the exits saw of them."""
    return words(
        "--to speculators --adapter photo --dtype bfloat16 --data {} --split train --limit {} "
        "--prompt Caption: --steps {} --shortlist 1024 --max-new-tokens {} --out {} --json",
        *(arguments.data / CAPTIONS, arguments.learn, arguments.steps),
        *(LONGEST["captions"], work / "drafter"),
    )


def main() -> None:
    arguments = asked(__doc__, photo=True, photographs=96, steps=1500, learn=3000)
    work, entries = RUNS / RECORD.name, list[dict[str, Any]]()
    trained = step("export", export_words(work, arguments), work, arguments.data)
    assert offramp_ngram is not None  # importing it registers its drafter
    adapter, encoder = load_photo(arguments.adapter, vision=TOWER)
    drafter = load_drafter(adapter.backbone, work / "drafter")
    ways = ways_of(adapter, drafter)
    examples = halves(arguments.data)[1][: arguments.photographs]
    for at_once in AT_ONCE:
        by_name = {
            name: partial(answered, adapter=adapter, encoder=encoder, way=way, at_once=at_once)
            for name, way in ways.items()
        }
        groups, kept = Group.all(examples, at_once), Turns(work / f"{at_once}.jsonl")
        told = {n: [*chain(*r)] for n, r in kept.answers(by_name, groups, f"{at_once}").items()}
        entries += entries_of(told, at_once, examples, encoder)
    RECORD.write(
        {
            "photographs": len(examples),
            "drafter": trained,
            "exit_seconds": adapter.metrics["seconds"],
            "entries": entries,
        }
    )


if __name__ == "__main__":
    main()
