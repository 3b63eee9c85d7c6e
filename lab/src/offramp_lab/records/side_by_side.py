"""Exits beside other ways to spare full depth: one model, engine and set of photographs.

`python -m offramp_lab.records.side_by_side` needs photographs and onnxruntime, and first trains an
EAGLE-3 drafter on the full model's captions of the training split. All ways caption the same
photographs in the batch engine (PyTorch, float32, one thread), one at a time and several at once,
in turns. They are early exit by thresholds, with the exits that ship and with untrained ones, and
every token at the exit; losslessly exits that draft on, untrained exits, EAGLE-3, and n-grams of
the text. CPU milliseconds to the first token (picture and vision tower included, and the prompts
before it where several come at once), and for each that follows. What was answered is kept in
runs/side_by_side, so that a run that was cut off goes on there.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from examples.ngram_plugin import offramp_ngram
from examples.photo_vlm.evaluate import LONGEST
from examples.photo_vlm.rows import CAPTIONS
from offramp_vllm.exports.eagle3 import Eagle3Drafter

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import FULL
from offramp.core.models.exits import Exits
from offramp.evaluation.statistics import Measure, interval, mean_of
from offramp.evaluation.timing import decoding
from offramp.inputs.example import Example
from offramp_lab.experiments.experiment import Rates, same, times
from offramp_lab.experiments.factors import LOSSLESS
from offramp_lab.methods.eagle import NAME, load_drafter
from offramp_lab.records.batched import Batched, answered
from offramp_lab.records.photographs.opened import STATIC, THRESHOLDS, TOWER, policy_of
from offramp_lab.records.photographs.told import scores
from offramp_lab.records.record import Group, Record, Turns, words
from offramp_lab.records.subjects import halves, load_photo
from offramp_lab.records.walk import Walk

RECORD = Record("side_by_side")
AT_ONCE = (1, 8, 32)


def ways_of(adapter: Adapter, drafter: Eagle3Drafter) -> dict[str, Batched]:
    """All ways by name."""
    exits = adapter.exits
    policy = {mode: policy_of(adapter, mode) for mode in (THRESHOLDS, STATIC, LOSSLESS)}
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
        "thresholds": Batched(policy[THRESHOLDS], exits),
        "thresholds, untrained": Batched(policy[THRESHOLDS], fresh),
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
    ids = {name: [one["ids"] for one in rows] for name, rows in told.items()}
    seconds: dict[str, Any] = {
        name: np.array([(one["first"] + one["rest"], one["rest"]) for one in rows]).T
        for name, rows in told.items()
    }
    rounds = {
        name: [kept for one in rows for _, kept in one["rounds"]] for name, rows in told.items()
    }

    def rates(name: str) -> Rates:
        """Tokens after the first of each answer, and their seconds."""
        took = seconds[name]
        rest = decoding(took, seconds["full"]) if rounds[name] else took[1]
        return np.stack([[len(each) - 1.0 for each in ids[name]], rest])

    def cider(name: str) -> Measure:
        return mean_of(scores("captions", encoder, ids[name], examples)["CIDEr"])

    full, base, entries = rates("full"), cider("full"), []
    for name, rows in told.items():
        own, score = rates(name), cider(name)
        entries.append(
            {
                "way": name,
                "at_once": at_once,
                "identical": same(ids[name], ids["full"]),
                "CIDEr": score.value,
                "minus_full": score.value - base.value,
                "difference": interval(score, minus=base),
                "first_milliseconds": 1e3 * float(np.mean([one["first"] for one in rows])),
                "token_milliseconds": 1e3 * float(own[1].sum() / own[0].sum()),
                "over_full": times(own, full),
                "tokens_a_round": 1 + float(np.mean(rounds[name])) if rounds[name] else None,
            }
        )
    return entries


def figures(arguments: Namespace) -> dict[str, Any]:
    work, entries = RECORD.work, list[dict[str, Any]]()
    export = words(  # learns captions of the training split, as much as the exits saw of them
        "--to speculators --adapter photo --dtype bfloat16 --data {} --split train --limit {} "
        "--prompt Caption: --steps {} --shortlist 1024 --max-new-tokens {} --out {} --json",
        *(arguments.data / CAPTIONS, arguments.learn, arguments.steps),
        *(LONGEST["captions"], work / "drafter"),
    )
    trained = Walk(work, arguments.data).step("export", export)
    assert offramp_ngram is not None  # importing it registers its drafter
    adapter, encoder = load_photo(arguments.adapter, vision=TOWER)
    ways = ways_of(adapter, load_drafter(adapter.backbone, work / "drafter"))
    examples = halves(arguments.data)[1][: arguments.photographs]
    for at_once in AT_ONCE:
        by_name = {
            name: partial(answered, adapter=adapter, encoder=encoder, way=way, at_once=at_once)
            for name, way in ways.items()
        }
        groups, kept = Group.all(examples, at_once), Turns(work / f"{at_once}.jsonl")
        told = {n: [*chain(*r)] for n, r in kept.answers(by_name, groups, f"{at_once}").items()}
        entries += entries_of(told, at_once, examples, encoder)
    return {
        "photographs": len(examples),
        "drafter": trained,
        "exit_seconds": adapter.metrics["seconds"],
        "entries": entries,
    }


if __name__ == "__main__":
    RECORD.run(__doc__, figures, photo=True, photographs=96, steps=1500, learn=3000)
