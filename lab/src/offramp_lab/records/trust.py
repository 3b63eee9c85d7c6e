"""Drafts that are taken by the product of their probabilities, beside thresholds; in trust.json.

`python -m offramp_lab.records.trust` captions photographs that nothing was chosen on in all ways,
each photograph in an order of its own: full depth, losslessly, at levels of trust, and by
thresholds, in PyTorch and in llama.cpp. CPU seconds of the process, from the processor's output on
(with the vision tower). What was answered is kept in runs/trust, so that a
run that was cut off goes on there. "even" in it: the share of changed answers from which thresholds
are as fast as lossless decoding; of the tiny models' captions and questions too, with T5's exits
from `offramp demo t5 --out runs/demo`. "taken" in it: answers that were taken at a level, and
differ; "judged" beside each, and beside full depth's own, is a reader's who saw the photograph:
right; partly, as with another action or colour; or wrong. It stays for the same answers.
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
from offramp.adapter.shipped import TINY
from offramp.calibration.trust_path import trusting
from offramp.cli import demo
from offramp.core.decoding.policy import FULL, ExitPolicy, Thresholds
from offramp.data.scenes.tasks import captions_and_questions
from offramp.evaluation.statistics import interval, mean_of
from offramp.evaluation.timing import generate_fn, timed
from offramp.inputs.example import Example
from offramp_lab.experiments.experiment import times
from offramp_lab.places import RUNS
from offramp_lab.records.end_to_end import CAREFUL, TOWER, at, scores
from offramp_lab.records.record import Kept, Record, Some, asked
from offramp_lab.records.subjects import halves, load_photo, text_of, tiny_with

RECORD = Record("trust")
LEVELS = (0.8, 0.6, 0.4, 0.25, 0.1, 0.02, 0.0)
PAIRS = {"as ships": None, "careful": CAREFUL, "0.6 / 0.7": {"thresholds": 0.6, "first": 0.7}}
TINY_THRESHOLDS = (0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
SCENES = 100
"""Each with a caption and two questions, of the tiny models' world."""
RESAMPLED = 2000
OPTIONS: dict[str, Any] = {"max_new_tokens": LONGEST["captions"], "do_sample": False}
ENGINES = ("torch", "llama.cpp q8_0", *(f"tiny {kind}" for kind in TINY))
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


def tiny_policies(adapter: Adapter) -> dict[str, ExitPolicy]:
    """Ways of a tiny model by name; one threshold is all exits'."""
    own, depths = adapter.policy, adapter.exits.depths
    return {
        "full": FULL,
        "lossless": replace(own, lossless=True),
        **{
            f"thresholds {level:g}": replace(
                own, thresholds=Thresholds(dict.fromkeys(depths, level))
            )
            for level in TINY_THRESHOLDS
        },
    }


def answered(
    generate: Callable[..., Any],
    ways: Mapping[str, ExitPolicy],
    encoder: Any,
    examples: Sequence[Example],
    engine: str,
    options: Mapping[str, Any],
) -> dict[str, list[Any]]:
    """CPU seconds, whole and of decoding, and the ids of each answer in each way."""
    kept = Kept(RUNS / RECORD.name / f"{engine}.jsonl")
    timings = {
        name: partial(
            timed, generate_fn(generate, policy=policy, **options), clock=time.process_time
        )
        for name, policy in ways.items()
    }
    return kept.answers(timings, examples, lambda one: encoder.prompts([one]), engine)


def even(told: Mapping[str, Sequence[Any]]) -> dict[str, float]:
    """The share of changed answers from which thresholds are as fast as lossless decoding, between
    those measured by a line, with its 95% interval over resampled answers; 1 where none are."""
    seconds = {name: np.array([row[0] for row in rows]) for name, rows in told.items()}
    full = told["full"]
    changed = {
        name: np.array([a[2] != b[2] for a, b in zip(rows, full, strict=True)])
        for name, rows in told.items()
        if name.startswith("thresholds")
    }

    def share(rows: Any) -> float:
        took = {name: float(own[rows].mean()) for name, own in seconds.items()}
        points = sorted((float(own[rows].mean()), took[name]) for name, own in changed.items())
        shares, times_taken = np.array([(0.0, took["full"]), *points]).T
        speeds = np.maximum.accumulate(took["full"] / times_taken)
        aim = took["full"] / took["lossless"]
        return float(np.interp(aim, speeds, shares, left=0.0, right=1.0))

    draws = np.random.default_rng(0).integers(len(full), size=(RESAMPLED, len(full)))
    low, high = np.quantile([share(rows) for rows in draws], (0.025, 0.975))
    return {"changed": share(slice(None)), "low": float(low), "high": float(high)}


def entries_of(
    told: Mapping[str, Sequence[Any]], engine: str, examples: Sequence[Example], encoder: Any
) -> list[dict[str, Any]]:
    """An entry for each way; multiples are of full depth's in the same engine."""

    def cider(rows: Sequence[Any]) -> Any:
        ids = [ids for _, _, ids in rows]
        return np.array(scores("captions", encoder, ids, examples)["CIDEr"])

    base, full, entries = cider(told["full"]), told["full"], list[dict[str, Any]]()
    took = {
        name: np.array([(1.0, seconds) for seconds, *_ in rows]).T for name, rows in told.items()
    }
    for name, rows in told.items():
        own = mean_of(cider(rows))
        entries.append(
            {
                "engine": engine,
                "way": name,
                "changed": float(np.mean([a[2] != b[2] for a, b in zip(rows, full, strict=True)])),
                "whole": times(took[name], took["full"]),
                "CIDEr": own.value,
                "difference": interval(own, minus=mean_of(base)),
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
    arguments = asked(__doc__, photo=True, photographs=300, scenes=SCENES, engines=Some(ENGINES))
    before = RECORD.read()
    entries = [e for e in before.get("entries", []) if e["engine"] not in arguments.engines]
    figures = {"photographs": arguments.photographs, **before, "entries": entries}
    figures["even"] = dict(before.get("even", {}))
    for engine in arguments.engines:
        if engine.startswith("tiny "):
            figures["even"][engine] = even(of_tiny(engine, arguments.scenes))
            figures["scenes"] = arguments.scenes
            continue
        adapter, encoder = load_photo(arguments.adapter, vision=TOWER)
        examples = halves(arguments.data)[1][: arguments.photographs]
        told = of_photo(engine, adapter, encoder, examples)
        entries += entries_of(told, engine, examples, encoder)
        figures["even"][engine] = even(told)
        figures["photographs"] = len(examples)
        if engine == "torch":
            figures["taken"] = taken(told, examples, encoder)
    RECORD.write(figures)


def of_photo(
    engine: str, adapter: Adapter, encoder: Any, examples: Sequence[Example]
) -> dict[str, list[Any]]:
    """As `answered`, of photographs' captions."""
    ways = policies(adapter)
    if engine == "torch":
        return answered(adapter.generate, ways, encoder, examples, engine, OPTIONS)
    folder = RUNS / RECORD.name / "files"
    if not folder.is_dir():
        export_gguf(adapter, folder, "q8_0")
    with LlamaCppRuntime(adapter, folder) as runtime:
        return answered(runtime.generate, ways, encoder, examples, engine, OPTIONS)


def of_tiny(engine: str, scenes: int) -> dict[str, list[Any]]:
    """As `answered`, of captions and questions about scenes on which nothing was chosen."""
    kind = engine.removeprefix("tiny ")
    adapter, encoder = tiny_with(kind, None if kind == "opt" else RUNS / "demo" / kind)
    examples = captions_and_questions("test", scenes, 300_000)
    ways = tiny_policies(adapter)
    return answered(adapter.generate, ways, encoder, examples, engine, demo.OPTIONS)


if __name__ == "__main__":
    main()
