"""What each idea is worth: objectives and policies through one loop, at equal quality.

Every objective trains exits at the same depths for the same steps; every policy is tried on FREE's
exits. Each pair is a curve of points, one for each threshold: quality of free-running answers on
test pictures, and decoding speed from a race in which all points take turns, and those that do the
same work run as one. The figure of merit is the speed at a quality, a mean over seeds; see
`offramp.research.comparison.equal_quality`.

A run's folder holds exits/ (a training run for each objective), points.jsonl (what is measured is
not measured again), compare.json and compare.svg.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm
from transformers import StoppingCriteriaList

from offramp.adapter import Adapter
from offramp.answers import Answer, answer_ids
from offramp.calibration.risk_functions import Quality
from offramp.data.decontamination import check_no_overlap, picture_digests
from offramp.data.example import Example, examples_digest, picture_of
from offramp.engine.confidence import STREAKS
from offramp.engine.generate import generate
from offramp.engine.policy import FULL, ExitPolicy, GenerationOutput
from offramp.errors import DataError, InputError
from offramp.evaluation.timing import GenerateFn, Timing, speedup, time_interleaved
from offramp.models.backbone import Backbone
from offramp.models.exits import Exits, ExitSet, propose_depths
from offramp.models.fingerprint import dump_fingerprint
from offramp.models.input_processor import InputProcessor
from offramp.provenance import provenance
from offramp.research.comparison.equal_quality import Each, drawn, equal_quality
from offramp.research.comparison.methods import (
    DEFAULT,
    FIXED,
    FREE,
    OBJECTIVES,
    POLICIES,
    QUALITIES,
    Plan,
)
from offramp.storage import JsonlLog, digest_rows, write_atomic, write_json
from offramp.training.feature_dataset import Stores
from offramp.training.trainer import Trainer

log = logging.getLogger(__name__)


def compare(
    backbone: Backbone,
    processor: Any,
    train: Sequence[Example],
    test: Sequence[Example],
    out: str | Path,
    plan: Plan = DEFAULT,
    *,
    quality: Quality | None = None,
) -> dict[str, Any]:
    """Train every objective, measure every point, and write compare.json and compare.svg in `out`.

    Run again with the same arguments, it goes on where it stopped; with other objectives, policies,
    more seeds or another timing, what is there is not trained or judged again, but all points
    are timed anew.

    train, test: of different pictures.
    quality: of `QUALITIES` or one's own; None: 1 for an answer that is the full model's, else 0,
        which needs no reference.

    Returns:
        `quality_full`; `n_train` and `n_test`, of examples; `points`, each with `seed`,
        `objective`, `policy`, `score`, `depths`, `thresholds`, `quality`, `quality_drop` (relative
        to the full model), `agreement` (share of answers that are the full model's), `mean_depth`,
        `speedup_decode` and `speedup_end_to_end` (against the full model in the same loop);
        `equal_quality`; `plan` and `provenance`.

    Raises:
        InputError: `out` holds another comparison.
        DataError: the examples cannot be used, or train and test share pictures.
    """
    if not train or not test:
        raise DataError("There are no examples to compare on.", "Give some to train and to test.")
    used = {"train": sorted(picture_digests(train))}
    check_no_overlap(
        used, test, ("train",), "Split by picture: offramp.data.example.split_examples."
    )
    bench = _Bench(backbone, processor, train, test, Path(out), plan, quality)
    points, each = bench.measured(bench.entries())
    found = {
        "quality_full": bench.quality_full,
        "n_train": len(train),
        "n_test": len(test),
        "points": points,
        "equal_quality": equal_quality(points, each),
        "plan": asdict(plan),
        "provenance": provenance(plan.training.seed, sys.argv, examples_digest([*train, *test])),
    }
    write_json(Path(out) / "compare.json", found)
    write_atomic(Path(out) / "compare.svg", drawn(found))
    return found


# -- points ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """A point to be measured: what it is called, and whose exits leave by which rule."""

    seed: int
    objective: str
    policy: str
    adapter: Adapter
    rule: ExitPolicy

    @property
    def name(self) -> dict[str, Any]:
        thresholds = {str(d): t for d, t in self.rule.thresholds.items()}
        return {
            "seed": self.seed,
            "objective": self.objective,
            "policy": self.policy,
            "score": self.rule.score,
            "depths": list(self.rule.thresholds),
            "thresholds": thresholds,
        }


class _Bench:
    """One comparison: its exits, its test answers and its log."""

    def __init__(
        self,
        backbone: Backbone,
        processor: Any,
        train: Sequence[Example],
        test: Sequence[Example],
        out: Path,
        plan: Plan,
        quality: Quality | None,
    ) -> None:
        self.backbone, self.processor, self.out, self.plan = backbone, processor, out, plan
        self.train, self.test, self.quality = list(train), list(test), quality
        self.encoder = InputProcessor(backbone, processor)
        self._labelled = all(example.answers for example in self.train)
        self._stores: dict[Any, Stores] = {}
        self._adapters: dict[Any, Adapter] = {}
        self._rows = _rows_of(out / "points.jsonl", self._settings())
        self._batches = _Inputs(self.encoder, self.test, plan.batch_size)
        self.full, _ = self._answers(None, FULL, self._batches)
        self.qualities_full = self._qualities(self.full)
        self.quality_full = float(self.qualities_full.mean())

    def _settings(self) -> dict[str, Any]:
        """What every row depends on. Objectives, policies, pairs and seeds may be added later, and
        another race be run."""
        plan = asdict(self.plan)
        for name in ("objectives", "policies", "pairs", "seeds", "timed", "rounds"):
            del plan[name]
        return {
            "backbone": dump_fingerprint(self.backbone.fingerprint()),
            "train": examples_digest(self.train),
            "test": examples_digest(self.test),
            "plan": digest_rows([plan]),
            "quality": _name_of(self.quality),
        }

    # -- exits --------------------------------------------------------------------------------

    def entries(self) -> list[_Entry]:
        """Every point of the grid, seed by seed."""
        first = self.plan.training.seed
        return [e for seed in range(first, first + self.plan.seeds) for e in self._grid(seed)]

    def _grid(self, seed: int) -> list[_Entry]:
        layers, plan = self.backbone.depth, self.plan
        curve = partial(self._curve, seed)
        depths = plan.depths or propose_depths(layers)
        several = plan.several or propose_depths(layers, min(3, layers - 1))
        cut = tuple(sorted({max(1, round(layers * k / 6)) for k in range(1, 6)} | {layers - 1}))
        found = [
            entry
            for objective in plan.others(labelled=self._labelled)
            for entry in curve(objective, "max_probability", depths)
        ]
        for policy in dict.fromkeys(("max_probability", *plan.policies)):
            if policy == "truncation":
                found += curve("logit_lens", policy, cut)
                continue
            if policy not in (*STREAKS, *FIXED):
                found += curve(FREE, policy, depths)
            found += curve(FREE, policy, several)
        there = {(entry.objective, entry.policy) for entry in found}
        for objective, policy in dict.fromkeys(plan.pairs):
            if (objective, policy) not in there:
                found += curve(objective, policy, several)
        for store in (one for pair in self._stores.values() for one in pair):
            store.clear()
        self._stores = {}
        return found

    def _curve(
        self, seed: int, objective: str, policy: str, depths: tuple[int, ...]
    ) -> list[_Entry]:
        if (key := (seed, objective, depths)) not in self._adapters:
            self._adapters[key] = self._trained(*key)
        adapter = self._adapters[key]
        shortlist = adapter.policy.shortlist
        rule = ExitPolicy(score=POLICIES[policy], exit_in_prefill=True, shortlist=shortlist)
        if policy in FIXED:
            rules = [replace(rule, thresholds={d: 0.0}) for d in depths]
        else:
            if rule.score == "agreement":
                right = adapter.metrics["agreement"].items()
                weights = {int(d): max(share, 1e-3) for d, share in right}  # not all may be 0
                rule = replace(rule, weights=weights)
            levels = self._levels(adapter, rule)
            rules = [replace(rule, thresholds=dict.fromkeys(depths, t)) for t in levels]
        return [_Entry(seed, objective, policy, adapter, r) for r in rules]

    def _levels(self, adapter: Adapter, rule: ExitPolicy) -> list[float]:
        """Thresholds that spread what leaves: quantiles of scores, or the steps of an
        agreement."""
        depths = adapter.exits.depths
        if rule.score == "patience":
            return [n / (len(depths) - 1) for n in range(1, len(depths))]
        if rule.score == "agreement":
            weights = np.array([rule.weights[d] for d in depths])
            steps = weights.cumsum() / weights.sum()
            return sorted({float(s * p) for s in steps for p in (0.8, 0.95, 0.99)})
        probe = self.encoder.prompts(self._some(self.plan.batch_size))
        scores: list[float] = []
        for depth in depths:
            sure = replace(rule, thresholds={depth: 1.0})
            answers, _ = self._answers(adapter, sure, [probe])
            scores += [s for answer in answers for s in answer.scores if s == s]
        return sorted({float(np.quantile(scores, q)) for q in self.plan.quantiles})

    def _trained(self, seed: int, objective: str, depths: tuple[int, ...]) -> Adapter:
        """The objective's exits; what was trained before is taken up."""
        changes = OBJECTIVES[objective]
        if changes is None:
            return Adapter(self.backbone, ExitSet(Exits(self.backbone, depths, kind="lens")))
        if changes.get("regime") == "supervised" and not self._labelled:
            changes = {**changes, "regime": "pseudo", "min_confidence": 0.0}
        config = replace(self.plan.training, **{**changes, "depths": depths, "seed": seed})
        folder = exits_folder(self.out, seed, objective, depths)
        trainer = Trainer(self.backbone, self.processor, self.train, config, folder)
        log.info(f"seed {seed}: {objective} exits at {list(depths)}")
        return trainer.run(resume=True, kept=self._stores)

    # -- measuring ----------------------------------------------------------------------------

    def measured(self, entries: Sequence[_Entry]) -> tuple[list[dict[str, Any]], Each]:
        """Every entry's point, and what its figures are made of; what the log holds is not measured
        again."""
        with JsonlLog(self.out / "points.jsonl") as rows:
            if not self._rows:
                rows.append({"settings": self._settings()})
            for entry in _bar("quality")(entries):
                key = digest_rows([entry.name])
                if key not in self._rows:
                    self._rows[key] = {**entry.name, **self._quality(entry)}
                    rows.append({"key": key, "row": self._rows[key]})
            found, each, seconds = [], [], []
            for _, same in groupby(entries, key=lambda entry: entry.seed):
                racing = {digest_rows([entry.name]): entry for entry in same}
                timed = digest_rows([self.plan.timed, self.plan.rounds, *racing])
                if timed not in self._rows:
                    self._rows[timed] = self._race(racing)
                    rows.append({"key": timed, "row": self._rows[timed]})
                raced = self._rows[timed]
                for key in racing:
                    point = {**self._rows[key], **raced[key]}
                    each.append(point.pop("each"))
                    seconds.append((raced["full"]["decode"], point.pop("decode")))
                    found.append(point)
        groups = [picture_of(example) for example in self.test]
        full, early = np.array(seconds).swapaxes(0, 1)
        return found, Each(self.qualities_full, np.array(each), groups, full, early)

    def _quality(self, entry: _Entry) -> dict[str, Any]:
        answers, depths = self._answers(entry.adapter, entry.rule, self._batches)
        same = [a.ids == b.ids for a, b in zip(answers, self.full, strict=True)]
        each = self._qualities(answers)
        quality = float(each.mean())
        return {
            "quality": quality,
            "quality_drop": (self.quality_full - quality) / max(self.quality_full, 1e-9),
            "agreement": sum(same) / len(same),
            "mean_depth": float(np.mean(depths)),
            "each": np.round(each, 6).tolist(),
        }

    def _qualities(self, answers: Sequence[Answer]) -> Any:
        if self.quality is not None:
            return self.quality(answers, self.test)
        return np.array([float(a.ids == b.ids) for a, b in zip(answers, self.full, strict=True)])

    def _answers(
        self, adapter: Adapter | None, rule: ExitPolicy, batches: Iterable[Mapping[str, Any]]
    ) -> tuple[list[Answer], list[int]]:
        """Answers to some batches, and the depths of all their tokens."""
        answers: list[Answer] = []
        depths: list[int] = []
        for inputs in batches:
            result = self._generate(adapter, rule, inputs)
            texts, scores = self.encoder.texts(result.new_tokens), result.scores.tolist()
            for ids, text, some in zip(answer_ids(result), texts, scores, strict=True):
                answers.append(Answer(ids, text, tuple(some[: len(ids)])))
            depths += result.depths[result.depths > 0].tolist()
        return answers, depths

    def _some(self, n: int) -> list[Example]:
        """About `n` test examples, spread over all, since kinds of examples may come one by one."""
        return self.test[:: max(1, len(self.test) // n)][:n]

    def _generate(
        self, adapter: Adapter | None, rule: ExitPolicy, inputs: Mapping[str, Any], **more: Any
    ) -> GenerationOutput:
        """By an adapter's exits, or without any."""
        options = {"max_new_tokens": self.plan.max_new_tokens, "do_sample": False, **more}
        if adapter is None:
            return generate(self.backbone, inputs, **options)
        return adapter.generate(inputs, policy=rule, **options)

    def _race(self, entries: Mapping[str, _Entry]) -> dict[str, dict[str, Any]]:
        """Speeds against the full model and each round's seconds of decoding, by key.

        All points of a seed take turns at one answer, and then at the next. Those that do the same
        work on it race as one: it says nothing about them that the machine was slower for one.
        """
        ran = {key: Timing() for key in ("full", *entries)}
        for example in _bar("timing")(self._some(self.plan.timed)):
            inputs = self.encoder.prompts([example])
            ways: dict[str, GenerateFn] = {"full": partial(self._way, None, FULL)}
            works = {"full": "full"}
            for key, entry in entries.items():
                works[key] = self._work(entry, inputs)
                ways.setdefault(works[key], partial(self._way, entry.adapter, entry.rule))
            timings = time_interleaved(ways, [inputs], rounds=self.plan.rounds)
            for key, work in works.items():
                ran[key] = ran[key] + timings[work]
        full = ran["full"]
        return {
            key: {
                "speedup_decode": speedup(full.decode, own.decode),
                "speedup_end_to_end": speedup(full.seconds, own.seconds),
                "decode": own.decode,
            }
            for key, own in ran.items()
        }

    def _work(self, entry: _Entry, inputs: Mapping[str, Any]) -> str:
        """A name for what a point computes for an answer: where it looks, at what, and how deep
        each token goes. Weights and thresholds differ within it, but for 0, where nothing looks."""
        exits, rule = entry.adapter.exits, entry.rule
        unseen = {depth: threshold == 0 for depth, threshold in rule.thresholds.items()}
        depths = self._generate(entry.adapter, rule, inputs).depths.tolist()
        kind = type(exits.at(exits.depths[0])).__name__
        return str((kind, exits.depths, rule.score, rule.shortlist, unseen, depths))

    def _way(
        self,
        adapter: Adapter | None,
        rule: ExitPolicy,
        inputs: Mapping[str, Any],
        stop: StoppingCriteriaList,
    ) -> Tensor:
        return self._generate(adapter, rule, inputs, stopping_criteria=stop).new_tokens[0]


def exits_folder(out: Path, seed: int, objective: str, depths: Sequence[int]) -> Path:
    """Where a comparison keeps what an objective trained."""
    return out / "exits" / f"{objective}-{'-'.join(map(str, depths))}-seed-{seed}"


class _Inputs:
    """Batches of examples, encoded when they come up; the first ones, within `room`, are kept."""

    def __init__(
        self, encoder: InputProcessor, examples: Sequence[Example], size: int, room: int = 1 << 30
    ) -> None:
        """room: bytes."""
        self._encoder, self._room = encoder, room
        self._chunks = [examples[i : i + size] for i in range(0, len(examples), size)]
        self._kept: dict[int, dict[str, Any]] = {}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, chunk in enumerate(self._chunks):
            inputs = self._kept.get(number) or self._encoder.prompts(chunk)
            size = sum(tensor.nbytes for tensor in inputs.values())
            if number not in self._kept and size <= self._room:
                self._kept[number] = inputs
                self._room -= size
            yield inputs


def _name_of(quality: Quality | None) -> str:
    if quality is None:
        return "agreement"
    known = (name for name, one in QUALITIES.items() if one is quality)
    return next(known, getattr(quality, "__qualname__", type(quality).__name__))


def _rows_of(path: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the log holds by key, or `InputError` if it is another comparison's."""
    if not path.exists():
        return {}
    rows = JsonlLog.read(path)
    differs = [n for n in settings if rows and rows[0]["settings"].get(n) != settings[n]]
    if differs:
        raise InputError(
            f"{path.parent} holds a comparison with another {', '.join(differs)}.",
            "Give the arguments of that run, or another folder.",
        )
    return {row["key"]: row["row"] for row in rows[1:]}


def _bar(title: str) -> Any:
    return lambda things: tqdm(things, title, disable=None, leave=False)
