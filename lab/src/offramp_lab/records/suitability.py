"""What `offramp inspect --suitability` foretells of exits, beside exits that were then trained;
rewrites suitability.json in lab/records.

On 200 prompts without labels: the tiny models (scenes), and the photo model (photographs,
bfloat16), whose exit ships. The tiny models' exits, at three depths, are trained here as `offramp
train` does, once, and kept in runs/suitability. What is trained is read along the full model's
answers to other prompts, and decodes some of these, beside full depth, for its speed. One thread.
`python -m offramp_lab.records.suitability` takes an hour; `--models tiny-opt` makes a part again.
"""

from __future__ import annotations

import os
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from examples.photo_vlm.rows import half_of, read_photographs
from tqdm import tqdm
from transformers import StoppingCriteriaList

from offramp.adapter import Adapter
from offramp.answers import full_model_answers
from offramp.calibration.replay import replay
from offramp.calibration.suitability import LEVELS, settled, suitability
from offramp.data.example import Example
from offramp.data.scenes.tasks import captions, questions
from offramp.engine.policy import ExitPolicy, Thresholds
from offramp.evaluation.statistics import Measure, interval
from offramp.evaluation.timing import FirstToken, exit_generate_fn, in_turn
from offramp.models.input_processor import InputProcessor
from offramp.models.shipped import load_named, shipped_exits
from offramp.training.config import TrainConfig
from offramp.training.trainer import train
from offramp_lab.places import RUNS
from offramp_lab.records.record import Record, asked

RECORD = Record("suitability")
PROMPTS = 200
LEVEL = 0.95
"""At which speeds are measured."""
TRAINED = 1200
"""Scenes that the tiny models' exits are trained on; each gives a caption and two questions."""
DEPTHS = (2, 4, 8)


@dataclass(frozen=True)
class Case:
    """asked: prompts for the forecast. held_out: others, for what is trained. timed: of those."""

    adapter: Adapter
    encoder: InputProcessor
    asked: Sequence[Example]
    held_out: Sequence[Example]
    timed: Sequence[Example]
    planned: int
    longest: int


def scenes(split: str, pictures: int, start: int = 0) -> list[Example]:
    return captions(split, pictures, start).examples + questions(split, pictures, start).examples


def tiny(name: str) -> Case:
    backbone, processor = load_named(name)
    folder = RUNS / "suitability" / name
    if (folder / "adapter.json").is_file():
        adapter = Adapter.load(folder, backbone)
    else:
        config = TrainConfig(depths=DEPTHS)
        adapter = train(
            backbone, processor, scenes("train", TRAINED), config, folder,
            overwrite=True, command=["offramp_lab.records.suitability"],
        )  # fmt: skip
    held_out = scenes("test", PROMPTS)
    return Case(
        adapter, InputProcessor(backbone, processor), scenes("calibration", 67)[:PROMPTS], held_out,
        held_out[:50], planned=3 * TRAINED, longest=48,
    )  # fmt: skip


def photo(data: Path) -> Case:
    backbone, processor = load_named("photo", dtype="bfloat16")
    folder = shipped_exits("photo")
    assert folder is not None
    halves: tuple[list[Example], list[Example]] = ([], [])
    for example in read_photographs(data)["captions_val"][:1000]:
        halves[half_of(example)].append(example)
    return Case(
        Adapter.load(folder, backbone), InputProcessor(backbone, processor), halves[0][:PROMPTS],
        halves[1][:PROMPTS], halves[1][:50], planned=1500, longest=30,
    )  # fmt: skip


def measured(case: Case, rounds: int) -> dict[str, Any]:
    """What is foretold, what was trained, and how fast that is."""
    wall, cpu = time.perf_counter(), time.process_time()
    foretold = suitability(
        case.encoder, case.asked, depths=case.adapter.exits.depths, planned=case.planned,
        max_new_tokens=case.longest, progress=partial(tqdm, disable=None, leave=False),
    )  # fmt: skip
    seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    rows = full_model_answers(
        case.encoder, case.held_out, batch_size=32, max_new_tokens=case.longest
    )
    narrow = case.adapter.exits.shortlist is not None
    said = replay(case.encoder, case.adapter.exits, rows, shortlist=narrow)
    depths, policies = [], {"full": ExitPolicy()}
    for prospect in foretold.prospects:
        depth = prospect.depth
        right = (said.said[depth] == said.targets)[said.mask]
        scores = said.scores[depth][said.mask]
        shares = {f"{level:g}": settled(scores, right, level) for level in LEVELS}
        last = max(1, round(shares[f"{LEVEL:g}"] * len(scores)))
        threshold = float(np.sort(scores)[-last])
        policies[f"{depth}"] = ExitPolicy({depth: threshold}, shortlist=narrow)
        policies[f"{depth} lossless"] = ExitPolicy(
            lossless=True, drafts=Thresholds({depth: 0.0}), shortlist=narrow
        )
        depths.append(
            {"depth": depth, "agreement": float(right.mean()), "settled": shares,
             "threshold": threshold}
        )  # fmt: skip
    print(foretold.prospects, depths, seconds, file=sys.stderr)
    speeds = timed(case, policies, rounds)
    for row in depths:
        row["speedup"] = speeds[f"{row['depth']}"]
        row["lossless"] = speeds[f"{row['depth']} lossless"]
    return {
        "foretold": foretold.to_json(),
        "trained": depths,
        "tokens": int(said.mask.sum()),
        "held_out": len(case.held_out),
        "timed": len(case.timed),
        "rounds": rounds,
        "seconds": seconds,
        "dtype": str(case.encoder.backbone.dtype).removeprefix("torch."),
    }


def timed(case: Case, policies: dict[str, ExitPolicy], rounds: int) -> dict[str, Any]:
    """Decoding of each policy over full depth, by the clock: the ratio of sums over prompts, each
    one's median of rounds, with a 95% interval over prompts."""
    options: dict[str, Any] = {"max_new_tokens": case.longest, "do_sample": False}
    backbone, exits = case.encoder.backbone, case.adapter.exits

    def seconds(prompt: Any, run: Any) -> float:
        """Of a decoded token, the first, which the prompt's pass gives, left out."""
        first = FirstToken()
        tokens = len(run(prompt, StoppingCriteriaList([first])))
        assert first.seconds is not None
        return (time.perf_counter() - first.seconds) / max(1, tokens - 1)

    runs = {
        name: partial(seconds, run=exit_generate_fn(backbone, exits, policy, **options))
        for name, policy in policies.items()
    }
    prompts = [case.encoder.prompts([example]) for example in case.timed]
    bar = partial(tqdm, desc="timing", disable=None, leave=False)
    found = in_turn(runs, prompts, rounds=rounds, warm=2, progress=bar)
    took = {name: np.median(by_round, 0) for name, by_round in found.items()}
    ratios = {}
    for name in policies:
        both = np.stack([took["full"], took[name]], 1)
        value = float(both[:, 0].sum() / both[:, 1].sum())
        ratios[name] = {"value": value, "interval": interval(Measure(value, both))}
    return ratios


def main() -> None:
    cases: dict[str, Callable[[Path], Case]] = {
        "tiny-opt": lambda _: tiny("tiny-opt"),
        "tiny-t5": lambda _: tiny("tiny-t5"),
        "photo": photo,
    }

    def models(parser: ArgumentParser) -> None:
        parser.add_argument("--models", nargs="+", default=[*cases], choices=cases)

    arguments = asked(__doc__, photo=False, rounds=3, more=models)
    load = os.getloadavg()[0]

    def made(name: str) -> dict[str, Any]:
        return measured(cases[name](arguments.data), arguments.rounds)

    parts = {name: partial(made, name) for name in cases}
    RECORD.parts(parts, arguments.models, load=[round(load, 1), round(os.getloadavg()[0], 1)])


if __name__ == "__main__":
    main()
