"""Does the adversary help? FREE against distillation alone on the tiny models, matched in steps and
parameters; writes lab/records/ablation.json.

Labels: all, a tenth, a hundredth and none; then, without labels, the adversary's variants, and on
OPT the same after long training on few images. Every seed has images, split, order and
discriminator of its own, which all games of that seed share, so that differences are paired. Judged
on test images and on corrupted ones: exiting always, and by the share of tokens that may exit
while 99% of the answers stay the full model's.

Budget: 25 minutes on two cores, a process on each with OMP_NUM_THREADS=1:
    python -m offramp_lab.records.ablation --shard 0/2 &
    python -m offramp_lab.records.ablation --shard 1/2
A run that is in --out is not repeated; the process that finishes the last one writes the record.
`--estimate` prints what is left. `--settings` measures those again and leaves the record's other
rows as they are. `--quick` tries everything out in a few minutes, elsewhere.
"""

import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch

from offramp.adapter import Adapter
from offramp.answers import answers_to, full_model_answers
from offramp.data.example import Example
from offramp.data.scenes.tasks import captions_and_questions
from offramp.engine.confidence import SCORES
from offramp.engine.policy import ExitPolicy
from offramp.engine.teacher_forcing import exit_features
from offramp.models.input_processor import InputProcessor
from offramp.models.shipped import TINY, load_tiny
from offramp.storage import digest_rows, read_json, write_json
from offramp.training.config import TrainConfig
from offramp.training.feature_dataset import Stores
from offramp.training.feature_store import FeatureStore
from offramp.training.trainer import Trainer
from offramp_lab.experiments.statistics import t_interval
from offramp_lab.inputs.corruptions import CORRUPTIONS, corrupted
from offramp_lab.places import RUNS
from offramp_lab.records.record import Kept, Record, Some, asked
from offramp_lab.records.subjects import is_right

RECORD = Record("ablation")
DEPTH, BATCH, LONGEST, SEVERITY, KEPT = 2, 32, 48, 3, 0.99
ALONE = "distillation"

GAMES: dict[str, dict[str, Any]] = {
    ALONE: {"adversarial": 0.0},
    "weight 0.01": {"adversarial": 0.01},
}
_STRONGER = {"adversarial": 0.03}
VARIANTS: dict[str, dict[str, Any]] = {
    "weight 0.003": {"adversarial": 0.003},
    "weight 0.03": _STRONGER,
    "weight 0.1": {"adversarial": 0.1},
    "unconditional, 0.03": {**_STRONGER, "conditional": False},
    "unconditional, 0.1": {"adversarial": 0.1, "conditional": False},
    "hinge, 0.03": {**_STRONGER, "adversary": "hinge"},
    "relativistic, 0.03": {**_STRONGER, "adversary": "relativistic"},
    "R1, 0.03": {**_STRONGER, "gradient_penalty": 1.0},
    "spectral norm, 0.03": {**_STRONGER, "spectral_norm": True},
    "feature matching, 0.1": {"adversarial": 0.0, "feature_matching": 0.1},
    "sequence, 0.03": {**_STRONGER, "judged": "sequence"},
    "from half-way, 0.03": {**_STRONGER, "adversarial_start": 0.5},
}
"""Changes to the `TrainConfig` by name. A weight alone: FREE, logistic and conditional."""


@dataclass(frozen=True)
class Sizes:
    """Images (a caption and two questions each), steps of training, and the same for long
    training on few images."""

    pictures: int = 300
    steps: int = 300
    few: int = 60
    long: int = 450
    test: int = 160


QUICK = Sizes(pictures=12, steps=30, few=6, long=40, test=8)


@dataclass(frozen=True)
class Setting:
    """What all games of a row have in common. variants: models on which the variants are tried."""

    regime: dict[str, Any]
    variants: tuple[str, ...] = ()
    few: bool = False

    def games(self, kind: str) -> dict[str, dict[str, Any]]:
        return {**GAMES, **VARIANTS} if kind in self.variants else GAMES


SETTINGS = {
    "100% labels": Setting({"regime": "supervised"}),
    "10% labels": Setting({"regime": "mixed", "labelled_fraction": 0.1}),
    "1% labels": Setting({"regime": "mixed", "labelled_fraction": 0.01}),
    "no labels": Setting({}, variants=TINY),
    "no labels, few pictures, long training": Setting({}, variants=("opt",), few=True),
}


class Cell(NamedTuple):
    """One training run."""

    kind: str
    setting: str
    game: str
    seed: int

    def key(self, sizes: Sizes) -> str:
        """What the run depends on."""
        setting = SETTINGS[self.setting]
        game = setting.games(self.kind)[self.game]
        return digest_rows([[*self, setting.regime, game, asdict(sizes), DEPTH, BATCH, SEVERITY]])


def cells(seeds: int, settings: Sequence[str] = tuple(SETTINGS)) -> Iterator[list[Cell]]:
    """All runs, those that share their recorded states together."""
    for setting in settings:
        about = SETTINGS[setting]
        for seed in range(seeds):
            for kind in TINY:
                yield [Cell(kind, setting, game, seed) for game in about.games(kind)]


# -- one run --------------------------------------------------------------------------------------


class Place:
    """Test images, and what the full model makes of them: recorded once, read by every run."""

    def __init__(self, encoder: InputProcessor, examples: Sequence[Example]) -> None:
        self.encoder, self.examples = encoder, examples
        rows = full_model_answers(encoder, examples, batch_size=64, max_new_tokens=LONGEST)
        self.full = [row.ids for row in rows]
        self.store = FeatureStore(encoder, rows, (DEPTH,), batch_size=BATCH, cache="memory")
        self.store.fill()
        self.inputs = [encoder.prompts(examples[i : i + 64]) for i in range(0, len(examples), 64)]

    def quality(self, answers: Sequence[tuple[int, ...]]) -> float:
        """Share of answers that are right."""
        texts = self.encoder.tokenizer.batch_decode(
            [list(ids) for ids in answers], skip_special_tokens=True
        )
        return mean(is_right(*pair) for pair in zip(texts, self.examples, strict=True))

    def judged(self, adapter: Adapter) -> dict[str, float]:
        """Figures of exits: exiting always, and exiting where it is safe."""
        rule = ExitPolicy({DEPTH: 0.0})
        decoded = answers_to(adapter, self.encoder, self.inputs, rule, max_new_tokens=LONGEST)
        answers = [answer.ids for answer in decoded]
        same = [ids == full for ids, full in zip(answers, self.full, strict=True)]
        return {
            "quality": self.quality(answers),
            "identical": mean(same),
            **self._replayed(adapter),
        }

    @torch.inference_mode()
    def _replayed(self, adapter: Adapter) -> dict[str, float]:
        """Over the tokens of the full model's answers: the share on which exit and final layer
        agree, and the largest share that may exit by one threshold while `KEPT` of the answers
        stay as they are. Exact: up to the first token that differs both have read the same."""
        sure, worst, right = [], [], []
        for index in range(len(self.store)):
            batch = self.store[index]
            states = exit_features(adapter.backbone, adapter.exits.modules, batch)[DEPTH]
            logits = adapter.backbone.logits(states)
            score = SCORES["max_probability"](logits.flatten(0, 1)).view(batch.mask.shape)
            agrees = logits.argmax(-1) == batch.targets
            worst += torch.where(batch.mask & ~agrees, score, -1.0).amax(1).tolist()
            sure += score[batch.mask].tolist()
            right += agrees[batch.mask].tolist()
        may_differ = int((1 - KEPT) * len(worst) + 1e-9)
        above = sorted(worst, reverse=True)[may_differ]  # the surest mistake that is not allowed
        return {"tokens": mean(right), "may_leave": mean(s > above for s in sure)}


class Bench:
    """A backbone with its test images, whole and damaged."""

    def __init__(self, kind: str, sizes: Sizes) -> None:
        self.sizes = sizes
        self.backbone, self.processor = load_tiny(kind)
        encoder = InputProcessor(self.backbone, self.processor)
        whole = captions_and_questions("test", sizes.test)
        self.places = {"in": Place(encoder, whole), "out": Place(encoder, damaged(whole))}

    def full(self) -> dict[str, float]:
        """The full model's quality by place."""
        return {name: place.quality(place.full) for name, place in self.places.items()}

    def run(self, group: Sequence[Cell]) -> Iterator[dict[str, Any]]:
        """Train and judge one cell after the other; all share their recorded states."""
        recorded: dict[Any, Stores] = {}
        setting = SETTINGS[group[0].setting]
        sizes, seed = self.sizes, group[0].seed
        pictures, steps = (sizes.few, sizes.long) if setting.few else (sizes.pictures, sizes.steps)
        examples = captions_and_questions("train", pictures, seed * sizes.pictures)
        for cell in group:
            began = time.perf_counter()
            config = TrainConfig(
                exit_kind="layer", depths=(DEPTH,), steps=steps, batch_size=BATCH, seed=seed,
                patience=None,
                evaluate_every=steps,  # judged as the last step leaves them
                **setting.regime, **setting.games(cell.kind)[cell.game],
            )  # fmt: skip
            with tempfile.TemporaryDirectory() as folder:
                trainer = Trainer(self.backbone, self.processor, examples, config, Path(folder))
                adapter = trainer.run(recorded=recorded)
            yield {
                "key": cell.key(sizes),
                "cell": cell._asdict(),
                **{name: place.judged(adapter) for name, place in self.places.items()},
                "seconds": time.perf_counter() - began,
            }


def damaged(examples: Sequence[Example]) -> list[Example]:
    """The same on damaged images, the corruptions in turn."""
    names = list(CORRUPTIONS)
    turns = {group: i for i, group in enumerate(dict.fromkeys(e.group for e in examples))}
    return [corrupted(e, names[turns[e.group] % len(names)], SEVERITY, seed=0) for e in examples]


# -- the table ------------------------------------------------------------------------------------

FIGURES = [*product(("in", "out"), ("quality", "identical", "tokens", "may_leave"))]


def table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each backbone, setting and game the figures over seeds, and what they differ from
    distillation alone by, paired, with a 95% t-interval."""
    by_game: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        kind, setting, game, seed = Cell(**row["cell"])
        by_game.setdefault((kind, setting, game), {})[seed] = row
    return [
        {
            "backbone": kind,
            "setting": setting,
            "game": game,
            "seeds": sorted(by_seed),
            **{
                f"{name}_{place}": _figure(by_seed, by_game[kind, setting, ALONE], place, name)
                for place, name in FIGURES
            },
        }
        for (kind, setting, game), by_seed in by_game.items()
    ]


def _figure(
    ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]], place: str, name: str
) -> dict[str, Any]:
    """Ours over seeds; and the mean of ours minus theirs, and its interval."""
    values = [row[place][name] for row in ours.values()]
    gaps = [ours[s][place][name] - theirs[s][place][name] for s in ours]
    low, high = t_interval(gaps)
    return {
        "mean": mean(values),
        "standard_deviation": stdev(values) if len(values) > 1 else None,
        "difference": mean(gaps), "low": low, "high": high,
    }  # fmt: skip


# -- all runs -------------------------------------------------------------------------------------


def main() -> None:
    arguments = asked(
        __doc__, out=RUNS / "ablation", seeds=3, settings=Some(SETTINGS), shard="0/1",
        estimate=False, quick=False,
    )  # fmt: skip
    logging.getLogger("offramp").setLevel(logging.WARNING)
    sizes = QUICK if arguments.quick else Sizes()
    out = arguments.out / "quick" if arguments.quick else arguments.out
    target = out / "ablation.json" if arguments.quick else RECORD.path
    groups = list(cells(arguments.seeds, arguments.settings))
    if not arguments.estimate:
        part, parts = map(int, arguments.shard.split("/"))
        _run(groups[part::parts], out, part, sizes)
    rows = _kept(out).found
    wanted = [cell.key(sizes) for group in groups for cell in group]
    if left := [key for key in wanted if key not in rows]:
        seconds = mean(row["seconds"] for row in rows.values()) if rows else float("nan")
        print(f"{len(left)} of {len(wanted)} runs are left: {len(left) * seconds / 60:.0f} minutes")
        return
    done = [rows[key] for key in wanted]
    if set(arguments.settings) == set(SETTINGS):
        _write(target, done, out, sizes)
    else:
        _renew(target, done)


def _kept(out: Path, part: int = 0) -> Kept:
    """Runs that were made, by any process; this one adds its own."""
    return Kept(out / f"runs-{part}.jsonl", sorted(out.glob("runs-*.jsonl")))


def _run(groups: Sequence[Sequence[Cell]], out: Path, part: int, sizes: Sizes) -> None:
    """Run what is not in the folder yet."""
    kept, benches = _kept(out, part), dict[str, Bench]()
    for group in groups:
        todo, kind = [cell for cell in group if cell.key(sizes) not in kept], group[0].kind
        if todo and kind not in benches:
            benches[kind] = Bench(kind, sizes)
            write_json(out / f"full-{kind}.json", benches[kind].full())
        for row in benches[kind].run(todo) if todo else ():
            kept.keep(row["key"], row)
            print(json.dumps(row), file=sys.stderr)


def _write(target: Path, rows: Sequence[dict[str, Any]], out: Path, sizes: Sizes) -> None:
    record = {
        "depth": DEPTH,
        "sizes": asdict(sizes),
        "corruptions": list(CORRUPTIONS),
        "severity": SEVERITY,
        "answers_kept": KEPT,
        "full": {kind: read_json(out / f"full-{kind}.json") for kind in TINY},
        "cells": table(rows),
        "seconds": sum(row["seconds"] for row in rows),
    }
    RECORD.write(record, target)


def _renew(target: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Put these rows' cells in the place of the record's."""
    record = read_json(target)
    names = ("backbone", "setting", "game")
    fresh = {tuple(cell[n] for n in names): cell for cell in table(rows)}
    record["cells"] = [fresh.get(tuple(c[n] for n in names), c) for c in record["cells"]]
    settings = sorted({setting for _, setting, _ in fresh})
    renewed = {"settings": settings, "provenance": RECORD.origin()}
    write_json(target, {**record, "renewed": [*record.get("renewed", ()), renewed]})


if __name__ == "__main__":
    main()
