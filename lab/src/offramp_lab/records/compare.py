"""Objectives and policies on the tiny models, by their world's exact judges; writes
lab/records/compare.json.

Takes some three hours of one core on OPT and five on T5, which are its parts; an interrupted run
resumes where it stopped.
"""

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from offramp.adapter.adapter import Adapter
from offramp.adapter.shipped import TINY, load_tiny
from offramp.cli import demo
from offramp.core.decoding.policy import FULL, ExitPolicy
from offramp.data.scenes.tasks import captions, captions_and_questions, questions
from offramp.evaluation.timing import generate_fn, speedup, time_interleaved
from offramp.features.input_processor import InputProcessor
from offramp.training.config import FREE as TERMS
from offramp.training.config import TrainConfig
from offramp_lab.experiments.comparison.compare import compare
from offramp_lab.experiments.comparison.grid import exits_folder
from offramp_lab.experiments.comparison.methods import FEW, Plan
from offramp_lab.experiments.comparison.tradeoff import FREE
from offramp_lab.experiments.experiment import same
from offramp_lab.methods.propagate import Propagating
from offramp_lab.records.record import Record
from offramp_lab.records.subjects import right

RECORD = Record("compare")
DEPTHS = {"opt": ((1, 2), (1, 2, 4)), "t5": ((2, 4), (2, 4, 6))}
"""Of every objective's exits, and of the exits that the policies are tried on besides."""
STEPS = {"opt": 600, "t5": 1200}
"""T5's exits at depth 2 learn in a jump, which comes after 300 to 600 steps or more by seed."""
PUBLISHED = (
    ("cross_entropy", "patience"),
    ("cross_entropy", "saturation"),
    (FEW, "patience"),
    (FEW, "saturation"),
    ("logit_lens", "saturation"),
)
"""PABEE and MuE as published, whose exits learn from labels: all, a tenth, or none."""
QUANTILES = (0.0, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4)
DENSE = (0.0, 0.005, 0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2)
"""For FREE beside distillation alone: between two points far apart the line says little."""
SEEDS = {"opt": 6, "t5": 12}
"""Also for that; T5's differ by more."""
THRESHOLD = 0.9


TRAIN, TEST, FINER_TEST = 400, 400, 1200
"""Images to train and test on, a caption and two questions each; the last ones for FREE beside
distillation alone, as `SEEDS` are."""
TIMED, ROUNDS, CAPTIONS = 36, 5, 30
"""Of the interleaved timing; and captions that recompute and propagate are timed on."""


def compared(kind: str, _: object) -> dict[str, Any]:
    began, out = time.perf_counter(), RECORD.work / kind
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    backbone, processor = load_tiny(kind)
    depths, several = DEPTHS[kind]
    plan = Plan(
        depths=depths,
        several=several,
        pairs=PUBLISHED,
        quantiles=QUANTILES,
        training=TrainConfig(
            exit_kind="layer", steps=STEPS[kind], batch_size=32, patience=None, **TERMS
        ),
        seeds=3,
        timed=TIMED,
        rounds=ROUNDS,
    )
    train = captions_and_questions("train", TRAIN)
    against = partial(compare, backbone, processor, train, quality=right)
    comparison = against(captions_and_questions("test", TEST), out, plan)
    comparison["distillation"] = _finer(against, out / "distillation", plan, SEEDS[kind])
    free = Adapter.load(exits_folder(out, plan.training.seed, FREE, depths), backbone)
    comparison["kv"] = _kv(free, InputProcessor(backbone, processor))
    comparison["seconds"] = time.perf_counter() - began
    return comparison


def _finer(against: Callable[..., Any], out: Path, plan: Plan, seeds: int) -> dict[str, Any]:
    """The curve of distillation alone, which differs from FREE by the adversary and little else: it
    takes more answers and more seeds to see a difference."""
    alone = replace(
        plan,
        objectives=("distillation",),
        policies=("max_probability",),
        pairs=(),
        several=plan.depths,
        quantiles=DENSE,
        seeds=seeds,
    )
    comparison = against(captions_and_questions("test", FINER_TEST), out, alone)
    curves = comparison["equal_quality"]["curves"]
    curve = next(c for c in curves if c["objective"] == "distillation")
    return {**curve, "n_test": comparison["n_test"]}


def _kv(adapter: Adapter, encoder: InputProcessor) -> dict[str, Any]:
    """What fills the cache behind tokens that exited: speed, and answers that stay the same."""
    thresholds = dict.fromkeys(adapter.exits.depths, THRESHOLD)
    early = ExitPolicy(thresholds)
    filling = {"recompute": adapter, "propagate": Propagating.of(adapter)}
    timed = [encoder.prompts([e]) for e in captions("test", CAPTIONS).examples]
    methods = {"full": demo.generate_fn(adapter, FULL)}
    for name, each in filling.items():
        methods[name] = generate_fn(partial(each.generate, policy=early), **demo.OPTIONS)
    timings = time_interleaved(methods, timed, rounds=ROUNDS)
    tasks = [captions("test", TEST), questions("test", TEST)]
    full = demo.answers(adapter, encoder, tasks, FULL)
    figures: dict[str, Any] = {"threshold": THRESHOLD}
    for name, each in filling.items():
        ours = demo.answers(each, encoder, tasks, early)
        alike = sum(same(full[task], ours[task]) for task in full)
        figures[name] = {
            "speedup_decode": speedup(timings["full"].decode, timings[name].decode),
            "identical_answers": alike / sum(map(len, full.values())),
        }
    return figures


if __name__ == "__main__":
    RECORD.run(__doc__, {kind: partial(compared, kind) for kind in TINY})
