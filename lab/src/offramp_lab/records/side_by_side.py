"""Exits beside other ways to spare full depth: one model, engine and set of photographs.

`python -m offramp_lab.records.side_by_side` needs photographs and onnxruntime, and first trains an
EAGLE-3 drafter on the full model's captions of the training split. All ways caption the same
photographs in the batch engine (PyTorch, float32, one thread), one at a time and several at once,
in turns. They are early exit, by thresholds that ship and by careful ones, untrained exits at the
same thresholds, and every token at the exit; losslessly exits that draft on, four drafts sure or
not, untrained exits, EAGLE-3, trained and not, and n-grams of the text. CPU milliseconds to the
first token (picture and vision tower included, and the prompts before it where several come at
once), and for each that follows. What was answered is kept in runs/side_by_side, so that a run that
was cut off goes on there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
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
from offramp.core.decoding.policy import FULL, ExitPolicy
from offramp.core.models.exits import Exits, ExitSet
from offramp.evaluation.statistics import interval, mean_of
from offramp.evaluation.timing import decoding
from offramp.inputs.example import Example
from offramp.serving.core import EngineCore
from offramp.serving.engine_config import EngineConfig
from offramp.serving.request import Request
from offramp_lab.experiments.experiment import same, times
from offramp_lab.methods.eagle import NAME, attached, load_drafter
from offramp_lab.places import RUNS
from offramp_lab.records.end_to_end import CAREFUL, TOWER, always, at, scores
from offramp_lab.records.record import Group, Kept, Record, asked, words
from offramp_lab.records.subjects import halves, load_photo
from offramp_lab.records.text import step

RECORD = Record("side_by_side")
AT_ONCE = (1, 8, 32)
LIMIT = 128
EARLY, LOSSLESS = "early_exit", "lossless"
OPTIONS: dict[str, Any] = {"max_new_tokens": LONGEST["captions"], "do_sample": False}


@dataclass(frozen=True)
class Way:
    """mode: of its requests. drafter: that is attached meanwhile."""

    policy: ExitPolicy
    mode: str
    exits: ExitSet | None = None
    drafter: Eagle3Drafter | None = None


def ways_of(adapter: Adapter, drafter: Eagle3Drafter) -> dict[str, Way]:
    """All ways by name."""
    backbone, exits, policy = adapter.backbone, adapter.exits, adapter.policy
    [depth] = policy.thresholds
    fresh = replace(exits, modules=_untrained(adapter, "layer"))
    lossless = replace(policy, lossless=True)
    by_name: dict[str, Any] = {"lossless": True, "thresholds": {}, "first": {}}
    eagle = replace(policy, drafts={NAME: 0.1}, max_draft=7, **by_name)
    ngram = replace(policy, drafts={"ngram": 0.0}, max_draft=3, **by_name)
    copied = Eagle3Drafter(backbone, drafter.words)
    fixed = replace(lossless, drafts={depth: 0.0}, max_draft=4)
    return {
        "full": Way(FULL, "full"),
        "early exit": Way(policy, EARLY, exits),
        "early exit, careful": Way(at(policy, depth, **CAREFUL), EARLY, exits),
        "early exit, untrained": Way(policy, EARLY, fresh),
        "static": Way(always(policy, depth), EARLY, exits),
        "exit drafts": Way(lossless, LOSSLESS, exits),
        "exit drafts, always 4": Way(fixed, LOSSLESS, exits),
        "exit drafts, untrained": Way(
            lossless, LOSSLESS, replace(exits, modules=_untrained(adapter, exits.modules.kind))
        ),
        "EAGLE-3": Way(eagle, LOSSLESS, None, drafter),
        "EAGLE-3, untrained": Way(eagle, LOSSLESS, None, copied),
        "n-grams": Way(ngram, LOSSLESS),
    }


def _untrained(adapter: Adapter, kind: str) -> Exits:
    """Exits at the same depths, as training begins with them."""
    return Exits(adapter.backbone, adapter.exits.depths, kind=kind).requires_grad_(False)


def answered(
    adapter: Adapter, encoder: Any, way: Way, group: Sequence[Example], at_once: int
) -> list[dict[str, Any]]:
    """Caption the photographs, which come at the same moment. Returns for each the ids, the CPU
    seconds to the first token and after it, and the rounds."""
    backbone = adapter.backbone
    attaching: AbstractContextManager[None] = nullcontext()
    if way.drafter is not None:
        attaching = attached(backbone, way.drafter, at_once, LIMIT)
    config = EngineConfig(slots=at_once, limit=LIMIT)
    with attaching:
        core = EngineCore(backbone, way.exits, way.policy, config, clock=time.process_time)
        begin = time.process_time()
        handles = [
            core.add(Request(encoder.prompts([example]), way.mode, options=OPTIONS))
            for example in group
        ]
        opened = time.process_time() - begin
        core.run()
    done = [handle.result() for handle in handles]
    return [
        {
            "ids": one.output.new_tokens[0].tolist(),
            "first": opened / len(group) + one.first,
            "rest": sum(one.gaps),
            "rounds": [*one.output.rounds],
        }
        for one in done
    ]


def measured(
    adapter: Adapter,
    encoder: Any,
    ways: Mapping[str, Way],
    examples: Sequence[Example],
    at_once: int,
    work: Path,
) -> dict[str, list[dict[str, Any]]]:
    """What each way answered to each photograph, so many at once."""
    by_name = {
        name: partial(answered, adapter, encoder, way, at_once=at_once)
        for name, way in ways.items()
    }
    groups, kept = Group.all(examples, at_once), Kept(work / f"{at_once}.jsonl")
    told = kept.answers(by_name, groups, lambda group: group.examples, f"{at_once} at once")
    return {name: [*chain(*rows)] for name, rows in told.items()}


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
        told = measured(adapter, encoder, ways, examples, at_once, work)
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
