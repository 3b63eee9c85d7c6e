"""Drafts that are taken by the product of their probabilities, beside thresholds; in trust.json.

Captions at full depth, losslessly, at levels of trust, and by thresholds, in PyTorch and in
llama.cpp. CPU seconds of the process, from the processor's output on (with the vision tower).
"even" in it: the share of changed answers from which thresholds are as fast as lossless decoding;
of the tiny models' captions and questions too, which `python -m
offramp_lab.records.photographs.trust` measures, with T5's exits from `offramp demo t5 --out
runs/demo`. "taken" in it: answers that were taken at a level, and differ; "judged" beside each, and
beside full depth's own, is a reader's who saw the photograph: right; partly, as with another action
or colour; or wrong. It stays for the same answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from offramp.adapter.adapter import Adapter
from offramp.adapter.shipped import TINY
from offramp.cli import demo
from offramp.core.decoding.policy import FULL, ExitPolicy, Thresholds
from offramp.data.scenes.tasks import captions_and_questions
from offramp.evaluation.timing import generate_fn, timed
from offramp_lab.experiments.experiment import Rates, identical, times
from offramp_lab.experiments.factors import LOSSLESS, Name
from offramp_lab.places import RUNS
from offramp_lab.records.photographs import opened as way
from offramp_lab.records.photographs.opened import PLAIN, Q8, TOWER, Opened
from offramp_lab.records.photographs.told import AFTER_PICTURE, Spec, Told, worth
from offramp_lab.records.record import Record, Turns, asked
from offramp_lab.records.subjects import text_of, tiny_with

RECORD = Record("trust", "photographs")
TRUST = {level: f"trust {level:g}" for level in (0.8, 0.6, 0.4, 0.25, 0.1, 0.02, 0.0)}
THRESHOLDS = (way.THRESHOLDS, "thresholds 0.4, 0.7", "thresholds 0.6, 0.7")
ENGINES = {PLAIN: "torch", Q8: "llama.cpp q8_0"}
TINY_THRESHOLDS = (0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
SCENES = 100
"""Each with a caption and two questions, of the tiny models' world."""
RESAMPLED = 2000
READ, COUNT = 0.1, 30
"""Level whose answers a reader judges, and how many."""
Taken = Mapping[str, tuple[Rates, Sequence[Sequence[int]]]]
"""By way: answers and their seconds [2, N], and their ids."""


def called(policy: ExitPolicy) -> dict[str, str]:
    """The modes by name."""
    return {
        "full": way.FULL_DEPTH,
        "lossless": LOSSLESS,
        **{n: n if level != policy.trust else way.EARLY for level, n in TRUST.items()},
        **{name: name for name in THRESHOLDS},
    }


def names(opened: Opened) -> list[Name]:
    modes = called(opened.adapter.policy).values()
    return [(engine, mode, TOWER) for engine in ENGINES for mode in modes]


def figures(told: Told) -> dict[str, Any]:
    found, before = dict[str, Any](), RECORD.read()
    entries, even_at = list[dict[str, Any]](), dict(before.get("even", {}))
    for engine, title in ENGINES.items():
        modes = called(told.opened.adapter.policy)
        own = {name: told.captions[engine, mode, TOWER] for name, mode in modes.items()}
        took = {name: (one.rates(AFTER_PICTURE), one.answers) for name, one in own.items()}
        even_at[title] = even(took)
        for name, one in own.items():
            scored = worth(one, own["full"])
            entries.append(
                {
                    "engine": title,
                    "way": name,
                    "changed": 1 - float(identical(one.answers, own["full"].answers).mean()),
                    "whole": times(took[name][0], took["full"][0]),
                    "CIDEr": scored["CIDEr"],
                    "difference": scored["difference_interval"],
                }
            )
        if engine == PLAIN:
            read = own[f"trust {READ:g}"]
            found["taken"] = taken(told, own["full"].answers, read.answers)
    found |= {"even": even_at, "scenes": before.get("scenes", SCENES)}
    return {"photographs": len(told.examples), "entries": entries, **found}


def even(told: Taken) -> dict[str, float]:
    """The share of changed answers from which thresholds are as fast as lossless decoding, between
    those measured by a line, with its 95% interval over resampled answers; 1 where none are."""
    seconds = {name: rates[1] for name, (rates, _) in told.items()}
    changed = {
        name: 1 - identical(answers, told["full"][1])
        for name, (_, answers) in told.items()
        if name.startswith("thresholds")
    }

    def share(rows: Any) -> float:
        took = {name: float(own[rows].mean()) for name, own in seconds.items()}
        points = sorted((float(own[rows].mean()), took[name]) for name, own in changed.items())
        shares, times_taken = np.array([(0.0, took["full"]), *points]).T
        speeds = np.maximum.accumulate(took["full"] / times_taken)
        aim = took["full"] / took["lossless"]
        return float(np.interp(aim, speeds, shares, left=0.0, right=1.0))

    count = len(seconds["full"])
    draws = np.random.default_rng(0).integers(count, size=(RESAMPLED, count))
    low, high = np.quantile([share(rows) for rows in draws], (0.025, 0.975))
    return {"changed": share(slice(None)), "low": float(low), "high": float(high)}


def taken(
    told: Told, full: Sequence[Sequence[int]], ours: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """The first answers that were taken at `READ` and differ from full depth's, to be read."""
    text, before = partial(text_of, told.encoder), RECORD.read().get("taken", [])
    judged = {(one["photograph"], one["full"], one["taken"]): one["judged"] for one in before}
    both = zip(told.examples, full, ours, strict=True)
    differ = [(e.key, text(one), text(own)) for e, one, own in both if one != own]
    return [
        {"photograph": key, "full": one, "taken": own, "judged": judged.get((key, one, own))}
        for key, one, own in differ[:COUNT]
    ]


# -- tiny models ----------------------------------------------------------------------------------


def tiny_policies(adapter: Adapter) -> dict[str, ExitPolicy]:
    """Ways of a tiny model by name; one threshold is all exits'."""
    own, depths = adapter.policy, adapter.exits.depths
    return {
        "full": FULL,
        "lossless": replace(own, lossless=True),
        **{
            f"thresholds {level:g}": replace(own, thresholds=Thresholds.shared(depths, level))
            for level in TINY_THRESHOLDS
        },
    }


def of_tiny(kind: str) -> Taken:
    """Captions and answers about scenes on which nothing was chosen."""
    adapter, encoder = tiny_with(kind, None if kind == "opt" else RUNS / "demo" / kind)

    def answer(example: Any, policy: ExitPolicy) -> Any:
        run = generate_fn(adapter.generate, policy=policy, **demo.OPTIONS)
        return timed(run, encoder.prompts([example]), time.process_time)

    ways: dict[str, Callable[[Any], Any]] = {
        name: partial(answer, policy=policy) for name, policy in tiny_policies(adapter).items()
    }
    examples = captions_and_questions("test", SCENES, 300_000)
    told = Turns(RECORD.work / f"tiny {kind}.jsonl").answers(ways, examples, kind)
    return {
        name: (np.array([(1.0, seconds) for seconds, *_ in rows]).T, [ids for *_, ids in rows])
        for name, rows in told.items()
    }


SPEC = Spec(RECORD, names, figures, photographs=300)


def main() -> None:
    asked(__doc__)
    found = {f"tiny {kind}": even(of_tiny(kind)) for kind in TINY}
    RECORD.add({"even": RECORD.read().get("even", {}) | found, "scenes": SCENES})


if __name__ == "__main__":
    main()
