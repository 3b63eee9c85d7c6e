"""Drafts that are taken by the product of their probabilities, beside thresholds; in trust.json.

`python -m offramp_lab.records.trust` captions photographs that nothing was chosen on in all ways,
each photograph in an order of its own: full depth, losslessly, at levels of trust, and by
thresholds, in PyTorch and in llama.cpp. CPU seconds of the process, from the processor's output on
(whole, with the vision tower) and of decoding. What was answered is kept in runs/trust, so that a
run that was cut off goes on there. "taken" in it: answers that were taken at a level, and differ;
"judged" beside each, and beside full depth's own, is a reader's who saw the photograph: right;
partly, as with another action or colour; or wrong. It stays for the same answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from examples.photo_vlm.evaluate import LONGEST
from offramp_llama_cpp import LlamaCppRuntime, export_gguf

from offramp.adapter.adapter import Adapter
from offramp.calibration.trust_path import trusting
from offramp.core.decoding.policy import FULL, ExitPolicy
from offramp.evaluation.statistics import interval, mean_of
from offramp.evaluation.timing import decoding, generate_fn, timed
from offramp.inputs.example import Example
from offramp_lab.experiments.experiment import times
from offramp_lab.places import RUNS
from offramp_lab.records.end_to_end import CAREFUL, TOWER, at, scores, text_of
from offramp_lab.records.record import Kept, Record, Some, asked
from offramp_lab.records.subjects import halves, load_photo

RECORD = Record("trust")
LEVELS = (0.8, 0.6, 0.4, 0.25, 0.1, 0.02, 0.0)
PAIRS = {"as ships": None, "careful": CAREFUL, "0.6 / 0.7": {"thresholds": 0.6, "first": 0.7}}
OPTIONS: dict[str, Any] = {"max_new_tokens": LONGEST["captions"], "do_sample": False}
ENGINES = ("torch", "llama.cpp q8_0")
READ, COUNT = 0.1, 30
"""Level whose answers a reader judges, and how many."""


def policies(adapter: Adapter) -> dict[str, ExitPolicy]:
    """All ways by name."""
    own = replace(adapter.policy, trust=None)
    by_trust = trusting(own, adapter, LONGEST["captions"])
    [depth] = own.thresholds or adapter.exits.depths
    return {
        "full": FULL,
        "lossless": replace(own, lossless=True),
        **{f"trust {level:g}": replace(by_trust, trust=level) for level in LEVELS},
        **{
            f"thresholds {name}": own if pair is None else at(own, depth, **pair)
            for name, pair in PAIRS.items()
            if pair or own.thresholds
        },
    }


def captioned(
    generate: Callable[..., Any],
    adapter: Adapter,
    encoder: Any,
    examples: Sequence[Example],
    engine: str,
) -> dict[str, list[Any]]:
    """CPU seconds, whole and of decoding, and the ids of each caption in each way."""
    kept = Kept(RUNS / RECORD.name / f"{engine}.jsonl")
    ways = {
        name: partial(
            timed, generate_fn(generate, policy=policy, **OPTIONS), clock=time.process_time
        )
        for name, policy in policies(adapter).items()
    }
    return kept.answers(ways, examples, lambda one: encoder.prompts([one]), engine)


def entries_of(
    told: Mapping[str, Sequence[Any]], engine: str, examples: Sequence[Example], encoder: Any
) -> list[dict[str, Any]]:
    """An entry for each way; multiples are of full depth's in the same engine."""

    def cider(rows: Sequence[Any]) -> Any:
        ids = [ids for _, _, ids in rows]
        return np.array(scores("captions", encoder, ids, examples)["CIDEr"])

    took: dict[str, Any] = {
        name: np.array([row[:2] for row in rows]).T for name, rows in told.items()
    }
    base, full, entries = cider(told["full"]), told["full"], list[dict[str, Any]]()
    one_each = np.ones(len(examples))
    tokens = {name: np.array([len(ids) - 1.0 for *_, ids in rows]) for name, rows in told.items()}
    rest: dict[str, Any] = {
        name: decoding(own, took["full"]) if name.startswith(("lossless", "trust")) else own[1]
        for name, own in took.items()
    }
    whole = {name: np.stack([one_each, own[0]]) for name, own in took.items()}
    decoded = {name: np.stack([tokens[name], rest[name]]) for name in told}
    for name, rows in told.items():
        own = mean_of(cider(rows))
        entries.append(
            {
                "engine": engine,
                "way": name,
                "changed": float(np.mean([a[2] != b[2] for a, b in zip(rows, full, strict=True)])),
                "whole": times(whole[name], whole["full"]),
                "decoding": times(decoded[name], decoded["full"]),
                "CIDEr": own.value,
                "difference": interval(own, minus=mean_of(base)),
                "milliseconds": 1e3 * float(took[name][0].mean()),
            }
        )
    return entries


def taken(
    told: Mapping[str, Sequence[Any]], examples: Sequence[Example], encoder: Any
) -> list[dict[str, Any]]:
    """The first answers that were taken at `READ` and differ from full depth's, to be read."""
    text, before = partial(text_of, encoder), RECORD.read().get("taken", [])
    judged = {(one["photograph"], one["full"], one["taken"]): one["judged"] for one in before}
    both = zip(examples, told["full"], told[f"trust {READ:g}"], strict=True)
    differ = [(e.key, text(full[2]), text(own[2])) for e, full, own in both if full[2] != own[2]]
    return [
        {"photograph": key, "full": full, "taken": own, "judged": judged.get((key, full, own))}
        for key, full, own in differ[:COUNT]
    ]


def main() -> None:
    arguments = asked(__doc__, photo=True, photographs=300, engines=Some(ENGINES))
    adapter, encoder = load_photo(arguments.adapter, vision=TOWER)
    examples = halves(arguments.data)[1][: arguments.photographs]
    entries, read = list[dict[str, Any]](), RECORD.read().get("taken", [])
    for engine in arguments.engines:
        told = partial(
            captioned, adapter=adapter, encoder=encoder, examples=examples, engine=engine
        )
        if engine == "torch":
            answered = told(adapter.generate)
            entries += entries_of(answered, engine, examples, encoder)
            read = taken(answered, examples, encoder)
            continue
        folder = RUNS / RECORD.name / "files"
        if not folder.is_dir():
            export_gguf(adapter, folder, "q8_0")
        with LlamaCppRuntime(adapter, folder) as runtime:
            entries += entries_of(told(runtime.generate), engine, examples, encoder)
    RECORD.write({"photographs": len(examples), "entries": entries, "taken": read})


if __name__ == "__main__":
    main()
