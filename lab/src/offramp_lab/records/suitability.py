"""What `offramp inspect --data` foretells of exits, beside exits that were trained; rewrites
suitability.json in lab/records.

On 200 prompts without labels: the exits that ship for the tiny OPT (scenes, float32) and for the
photo model (photographs, bfloat16); those that `offramp demo t5` leaves in runs/demo;
and three others of the photo model, as `python -m examples.photo_vlm.measure --regimes unsupervised
--work runs/photo-exits` leaves them with `--depths 8`, `--size small --depths 8` and `--size small
--depths 4`. Trained exits are read along the full model's
answers to other prompts, and decode 50 of these, beside full depth, for their speed.

Of exits that learn captions of the tiny models' world for a short while, on which no setting of the
forecast was chosen: what is foretold of thresholds that are calibrated to risks of changed answers,
and their speed once they are calibrated on 2,000 images of their own.

By the share of answers that change: the forecasts of thresholds and of trust, and the speeds of the
lowest that change at most as many of 200; and lossless decoding. Of the photo model as it ships, in
float32, and of the tiny OPT, whose exit learns to draft on as long as it learnt.

One thread. `python -m offramp_lab.records.suitability` takes an hour; `--parts opt
photo-speeds` makes some of its parts again.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from examples.photo_vlm.held_out import SIZES

from offramp.adapter.adapter import Adapter
from offramp.adapter.answers import Answer, full_model_answers
from offramp.adapter.shipped import TINY
from offramp.calibration import suitability as module
from offramp.calibration.asked import Guarantee
from offramp.calibration.attempts import Draws
from offramp.calibration.calibrate import GRID
from offramp.calibration.replay import replay
from offramp.calibration.risk_control import control
from offramp.calibration.risk_functions import RISKS
from offramp.calibration.suitability import LEVELS, Suitability, settled, suitability
from offramp.calibration.suitability import RISKS as RISKS_TOLD
from offramp.calibration.threshold_evaluator import ThresholdEvaluator
from offramp.calibration.trust_path import LEVELS as TRUSTS
from offramp.calibration.trust_path import NOTHING, TrustPath, trusting
from offramp.cli.demo import OPTIONS, DemoSizes
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.save_and_load import CONFIG
from offramp.core.storage import read_json
from offramp.data.scenes.tasks import captions, captions_and_questions
from offramp.evaluation.timing import beside_full, exit_generate_fn, timed
from offramp.features.input_processor import InputProcessor
from offramp.inputs.example import Example
from offramp.training.config import FREE, TrainConfig
from offramp.training.trainer import train_drafting
from offramp_lab.experiments.experiment import Experiment, bar, times
from offramp_lab.places import RUNS
from offramp_lab.records.record import Record
from offramp_lab.records.subjects import halves, load_photo, tiny_with, trained

RECORD = Record("suitability")
PROMPTS, TIMED = 200, 50
LEVEL = 0.95
"""At which speeds are measured."""
LEARNT, STEPS, CALIBRATED = 300, 300, 2000
"""Captions that exits learn, and for how long; images that thresholds are calibrated on."""
CHANGED = (0.05, 0.1, 0.2, 0.33, 0.5)
"""Shares of answers that thresholds and trust may change."""


@dataclass(frozen=True)
class Case:
    """asked: prompts for the forecast. held_out: others, for what is trained."""

    adapter: Adapter
    encoder: InputProcessor
    asked: Sequence[Example]
    held_out: Sequence[Example]
    planned: int
    longest: int

    @property
    def narrow(self) -> bool:
        """Whether the exits read a shortlist."""
        return self.adapter.exits.shortlist is not None


Opens = Callable[[Path], Case]
"""By the folder of photographs."""


def tiny(kind: str, exits: Path | None = None) -> Case:
    return Case(
        *tiny_with(kind, exits or (None if kind == "opt" else RUNS / "demo" / kind)),
        captions_and_questions("calibration", 67, 5000)[:PROMPTS],
        captions_and_questions("test", 67)[:PROMPTS],
        planned=3 * DemoSizes().train,
        longest=OPTIONS["max_new_tokens"],
    )


def drafting() -> Case:
    """The tiny OPT, whose exit learns, once, to draft on."""
    folder, sizes = RECORD.work / "drafting", DemoSizes()
    if not (folder / CONFIG).is_file():
        case, learnt = tiny("opt"), captions_and_questions("train", sizes.train)
        options = TrainConfig(steps=sizes.steps, batch_size=32, **FREE)
        train_drafting(case.adapter, case.encoder.processor, learnt, options, folder)
    return tiny("opt", folder)


def photo(
    data: Path, exits: Path | None = None, planned: int = 6000, dtype: str = "bfloat16"
) -> Case:
    asked, held_out = (half[:PROMPTS] for half in halves(data))
    model = load_photo(exits, dtype=dtype)
    return Case(*model, asked, held_out, planned=planned, longest=30)


def photo_at(data: Path, depth: int, size: str) -> Case:
    """Exits at another depth, or such as learnt from fewer prompts."""
    left = RUNS / f"photo-exits/measured-{size}-{depth}/exits/unsupervised"
    return photo(data, left, SIZES[size].captions)


def foretold(opened: Opens, arguments: Namespace) -> dict[str, Any]:
    """What is foretold, and what was trained."""
    case = opened(arguments.data)
    found, trained = forecast(case), []
    rows = full_model_answers(
        case.encoder, case.held_out, batch_size=32, max_new_tokens=case.longest
    )
    said = replay(case.encoder, case.adapter.exits, rows, shortlist=case.narrow)
    decoded = said.mask[:, 1:]  # the first token comes out of the prompt's pass
    for depth in case.adapter.exits.depths:
        right = (said.said[depth] == said.targets)[:, 1:][decoded]
        scores = said.scores[depth][:, 1:][decoded]
        shares = {f"{level:g}": settled(scores, right, level) for level in LEVELS}
        last = max(1, round(shares[f"{LEVEL:g}"] * len(scores)))
        trained.append(
            {
                "depth": depth,
                "agreement": float(right.mean()),
                "settled": shares,
                "threshold": float(np.sort(scores)[-last]),
            }
        )
    return {"foretold": found.to_json(), "trained": trained}


def forecast(case: Case) -> Suitability:
    return suitability(
        case.encoder,
        case.asked,
        depths=case.adapter.exits.depths,
        planned=case.planned,
        max_new_tokens=case.longest,
        progress=bar("forecast"),
    )


def measured(name: str, arguments: Namespace) -> dict[str, Any]:
    """The speeds of what was trained, which is a part before this one."""
    case = CASES[name](arguments.data)
    trained = read_json(RECORD.work / f"{name}.json")["trained"]
    return speeds(case, at_level(case, trained), arguments.rounds)


def speeds(case: Case, policies: Mapping[str, ExitPolicy], rounds: int) -> dict[str, Any]:
    """Decoding over full depth, by policy, in CPU seconds as the forecast has them: the ratio of
    sums over prompts, each one's median of rounds, with a 95% interval over prompts."""
    options: dict[str, Any] = {"max_new_tokens": case.longest, "do_sample": False}
    backbone, exits, clock = case.encoder.backbone, case.adapter.exits, time.thread_time
    runs = {
        name: partial(timed, exit_generate_fn(backbone, exits, policy, **options), clock=clock)
        for name, policy in {"full": ExitPolicy(), **policies}.items()
    }
    prompts = [case.encoder.prompts([example]) for example in case.held_out[:TIMED]]
    found = Experiment(runs, prompts, rounds, warm=2, title="timing").run()
    drafting = [name for name, policy in policies.items() if policy.drafting]
    found = beside_full(found, dict.fromkeys(drafting, "full"))

    def decoded(one: Any) -> float:
        """Seconds of a token, the first, which the prompt's pass gives, left out."""
        return float(one[1] / max(1, len(one[2]) - 1))

    took = {
        name: np.stack([np.ones(len(prompts)), np.median([[*map(decoded, r)] for r in own], 0)])
        for name, own in found.items()
    }
    ratios = {name: times(own, took["full"]) for name, own in took.items()}
    return {"timed": len(prompts), "rounds": rounds, **ratios}


def at_level(case: Case, found: Sequence[dict[str, Any]]) -> dict[str, ExitPolicy]:
    """By depth, what exits at the threshold of `LEVEL`."""
    return {
        f"{row['depth']}": ExitPolicy({row["depth"]: row["threshold"]}, shortlist=case.narrow)
        for row in found
    }


def calibrated(kind: str, depth: int, arguments: Namespace) -> dict[str, Any]:
    """The speed of calibrated thresholds, forecast with its interval and measured, by the share of
    answers that may change."""
    learnt = captions("train", LEARNT).examples
    model = trained(kind, learnt, depths=(depth,), steps=STEPS)
    asked = captions("calibration", PROMPTS, 5000).examples
    held_out = captions("test", TIMED).examples
    case = Case(*model, asked, held_out, planned=LEARNT, longest=OPTIONS["max_new_tokens"])
    [told] = forecast(case).prospects
    tested = captions("calibration", CALIBRATED, 10_000).examples
    evaluator = ThresholdEvaluator.of(
        *model, tested, ExitPolicy(shortlist=case.narrow), RISKS["disagreement"], **OPTIONS
    )
    columns: list[Any] = []
    for threshold in GRID:
        columns.append(evaluator.losses({depth: threshold}))
        if columns[-1].mean() > max(RISKS_TOLD):
            break
    losses = np.stack(columns, 1)
    rows, policies = [], {}
    for target in RISKS_TOLD:
        draws = Draws.of(losses, whole=True)
        index = control(draws, target, Guarantee(target).level(1)).index
        row: dict[str, Any] = {"target": target, "foretold": list(told.thresholds[target])}
        if index is not None:
            row |= {"threshold": GRID[index], "risk": float(losses[:, index].mean())}
            policies[f"{target:g}"] = replace(evaluator.policy, thresholds={depth: GRID[index]})
        rows.append(row)
    took = speeds(case, policies, arguments.rounds)
    for row in rows:
        row["measured"] = took.get(f"{row['target']:g}", took["full"])
    return {
        "depth": depth,
        "agreement": told.agreement,
        "images": len(tested),
        "learnt": LEARNT,
        "steps": STEPS,
        "cells": rows,
        "timed": took["timed"],
        "rounds": arguments.rounds,
    }


def ways(opened: Opens, arguments: Namespace) -> dict[str, Any]:
    """What is foretold of lossless decoding, thresholds and trust, by the share of answers that
    change."""
    targets = [2 * share for share in CHANGED]  # half of each is what may be measured
    with patch.object(module, "RISKS", targets):
        [told] = forecast(opened(arguments.data)).prospects
    both = {"thresholds": told.thresholds, "trust": told.trust}
    by_share = {way: [list(found[target]) for target in targets] for way, found in both.items()}
    return {"depth": told.depth, "changed": list(CHANGED), "lossless": told.lossless, **by_share}


def ways_measured(opened: Opens, arguments: Namespace) -> dict[str, Any]:
    """The speeds of the same, each at the lowest level that changes at most so many answers."""
    case = opened(arguments.data)
    of, [depth] = (case.adapter, case.encoder, case.held_out), case.adapter.exits.depths
    options: dict[str, Any] = {"max_new_tokens": case.longest, "do_sample": False}
    risk, known = RISKS["disagreement"], list[Answer]()
    exiting = ExitPolicy({depth: 1.0}, shortlist=case.narrow)
    trusted = trusting(ExitPolicy(shortlist=case.narrow), case.adapter, case.longest)
    path = TrustPath.of(*of, trusted, risk, known=known, **options)
    exits = ThresholdEvaluator.of(*of, exiting, risk, known=known, **options).replay
    assert exits is not None
    lost = {
        "thresholds": {level: exits.differs({depth: level}).mean() for level in (1.0, *GRID)},
        "trust": {level: path.losses({depth: level}).mean() for level in (NOTHING, *TRUSTS)},
    }
    policies = {"lossless": replace(trusted, trust=None, lossless=True)}
    levels: dict[str, list[dict[str, Any]]] = {}
    for way, policy in (("thresholds", exiting), ("trust", trusted)):
        for share in CHANGED:
            level = min(level for level, own in lost[way].items() if own <= share)
            policies[f"{way} {share:g}"] = policy.moved({depth: level})
            found = {"level": level, "changed": float(lost[way][level])}
            levels.setdefault(way, []).append(found)
    took = speeds(case, policies, arguments.rounds)
    for way, rows in levels.items():
        for share, row in zip(CHANGED, rows, strict=True):
            row["measured"] = took[f"{way} {share:g}"]
    counted = {name: took[name] for name in ("timed", "rounds", "lossless")}
    return {"answers": len(case.held_out), **counted, **levels}


CASES: dict[str, Opens] = {
    "opt": lambda _: tiny("opt"),
    "t5": lambda _: tiny("t5"),
    "photo": photo,
    "photo-large-8": partial(photo_at, depth=8, size="large"),
    "photo-small-8": partial(photo_at, depth=8, size="small"),
    "photo-small-4": partial(photo_at, depth=4, size="small"),
}
BRIEFLY = {f"{kind}-{depth}": partial(calibrated, kind, depth) for kind in TINY for depth in (1, 2)}
WAYS: dict[str, Opens] = {"opt": lambda _: drafting(), "photo": partial(photo, dtype="float32")}
PARTS = {
    **{
        name: part
        for case, opened in CASES.items()
        for name, part in (
            (case, partial(foretold, opened)),
            (f"{case}-speeds", partial(measured, case)),
        )
    },
    **BRIEFLY,
    **{f"{case}-ways": partial(ways, opened) for case, opened in WAYS.items()},
    **{f"{case}-ways-speeds": partial(ways_measured, opened) for case, opened in WAYS.items()},
}


if __name__ == "__main__":
    RECORD.run(__doc__, PARTS, data=True, rounds=3)
