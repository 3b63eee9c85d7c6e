"""Train exits on the built model in several regimes, and measure what each is worth on photographs.

Photographs to train exits on are of the training splits; the held-out ones are halved, and what is
chosen on one half is measured on the other. Every regime's figures are written as soon as they are
there, and what is there is not measured again.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from examples.photo_vlm.caption import load
from examples.photo_vlm.command import command, parser_of
from examples.photo_vlm.evaluate import (
    LONGEST,
    METRICS,
    accuracy,
    caption_figures,
    caption_measures,
)
from examples.photo_vlm.rows import read_photographs
from tqdm import tqdm

from offramp.adapter import Adapter
from offramp.answers import Answer, generate_answers
from offramp.calibration.calibrate import calibrate, path_of
from offramp.calibration.draft_thresholds import draft_speeds
from offramp.calibration.profiler import measure_costs
from offramp.calibration.risk_functions import RISKS
from offramp.calibration.threshold_evaluator import ThresholdEvaluator
from offramp.data.example import Example
from offramp.engine.policy import FULL, ExitPolicy
from offramp.errors import InputError
from offramp.evaluation.statistics import interval
from offramp.evaluation.timing import (
    GenerateFn,
    Timing,
    exit_generate_fn,
    speedup,
    stock_generate_fn,
    time_interleaved,
)
from offramp.models.exits import Exits
from offramp.models.vision_cache import VisionCache
from offramp.provenance import provenance
from offramp.research.analysis.analyse import RESULT, AnalysisConfig, analyse
from offramp.research.scenes.corruptions import CORRUPTIONS, corrupted
from offramp.storage import read_json, write_json
from offramp.training.config import TrainConfig
from offramp.training.feature_dataset import Stores
from offramp.training.trainer import Trainer

SHORTLIST = 2048
DROPS = (0.01, 0.03)
"""Relative drops of CIDEr within which the fastest thresholds are looked for."""
CONFIDENCE = 0.95
THRESHOLDS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Captions of a small model: few tokens are said with more than nine tenths of the probability."""
DRAFTS = (0.0, 0.1, 0.2, 0.3, 0.5)
SEVERITY = 3

_ALONE = {"adversarial": 0.0}
_LABELS_ONLY = {"distillation": 0.0, "adversarial": 0.0}
REGIMES: dict[str, dict[str, Any]] = {
    "unsupervised": {},
    "unsupervised, distillation alone": _ALONE,
    "100% labels": {"regime": "supervised"},
    "10% labels": {"regime": "mixed", "labelled_fraction": 0.1},
    "1% labels": {"regime": "mixed", "labelled_fraction": 0.01},
    "pseudo-labels": {"regime": "pseudo", "min_confidence": 0.35},  # about the surer half
    "100% labels, cross-entropy alone": {"regime": "supervised", **_LABELS_ONLY},
}
"""Changes to the `TrainConfig`."""


@dataclass(frozen=True)
class Sizes:
    """Photographs with captions and questions to train exits on, steps, examples measured, and
    the risks that are promised."""

    captions: int = 6000
    questions: int = 1000
    steps: int = 12_000
    held_out: int = 1000
    asked: int = 600
    timed: int = 20
    rounds: int = 5
    damaged: int = 200
    targets: tuple[float, ...] = (0.01, 0.05)


SMALL = Sizes(
    captions=800, questions=100, steps=1500, held_out=600, asked=200, timed=10, rounds=3, targets=()
)  # fmt: skip
"""To hold regimes against each other, in a quarter of an hour each."""
QUICK = Sizes(24, 8, 4, 16, 40, 2, 1, 8)
SIZES = {"whole": Sizes(), "small": SMALL, "quick": QUICK}


def _half(example: Example) -> int:
    """0 to choose on, 1 to measure on: by a hash of the photograph."""
    return hashlib.sha256(f"half:{example.group}".encode()).digest()[0] % 2


class Photos:
    """The built model, the photographs, and the full model's answers to them."""

    def __init__(
        self, built: tuple[Any, Any], data: Path, sizes: Sizes, depths: Sequence[int]
    ) -> None:
        """built: backbone and encoder."""
        self.backbone, self.encoder = built
        self.sizes, self.depths = sizes, tuple(depths)
        splits = read_photographs(data)
        self.train = splits["captions"][: sizes.captions] + splits["questions"][: sizes.questions]
        self.held = {
            "captions": splits["captions_val"][: sizes.held_out],
            "questions": splits["questions_val"][: sizes.asked],
        }
        self.cache = VisionCache(1 << 28)
        self.stores: dict[Any, Stores] = {}

    @property
    def timed(self) -> list[dict[str, Any]]:
        """Prompts to be timed on: captions of the measuring half."""
        return self._prompts(1, self.sizes.timed)

    @property
    def drafted(self) -> list[dict[str, Any]]:
        """Prompts that drafts are tried on: captions of the choosing half."""
        return self._prompts(0, 6)

    def _prompts(self, half: int, count: int) -> list[dict[str, Any]]:
        return [self.encoder.prompts([e]) for e in self.part("captions", half)[:count]]

    def part(self, name: str, half: int) -> list[Example]:
        return [e for e in self.held[name] if _half(e) == half]

    def answers(self, adapter: Adapter, name: str, examples: Sequence[Example]) -> list[Answer]:
        """Free-running greedy answers by the adapter's policy."""
        return generate_answers(
            adapter, self.encoder, examples,
            batch_size=64, max_new_tokens=LONGEST[name], vision_cache=self.cache,
        )  # fmt: skip

    @cached_property
    def none(self) -> Adapter:
        """The full model."""
        return Adapter(self.backbone, Exits(self.backbone, self.depths[:1], kind="lens"))

    @cached_property
    def full(self) -> dict[tuple[str, int], list[Answer]]:
        """The full model's answers by task and half."""
        return {
            (name, half): self.answers(self.none, name, self.part(name, half))
            for name in LONGEST
            for half in (0, 1)
        }


def cider(answers: Sequence[Answer], examples: Sequence[Example]) -> float:
    return caption_figures([a.text for a in answers], examples, ("CIDEr",))["CIDEr"]


# -- the full model ---------------------------------------------------------------------------


def full_figures(photos: Photos) -> dict[str, Any]:
    """The full model on all held-out photographs."""
    both = {
        name: [
            (answer, example)
            for half in (0, 1)
            for answer, example in zip(
                photos.full[name, half], photos.part(name, half), strict=True
            )
        ]
        for name in LONGEST
    }
    captions, questions = ([list(side) for side in zip(*both[n], strict=True)] for n in LONGEST)
    scores = caption_figures([a.text for a in captions[0]], captions[1], METRICS)
    return {
        "cider": scores["CIDEr"],
        "bleu_4": scores["Bleu_4"],
        "meteor": scores["METEOR"],
        "rouge_l": scores["ROUGE_L"],
        "daquar_accuracy": accuracy([a.text for a in questions[0]], questions[1]),
        "captions": len(captions[0]),
        "questions": len(questions[0]),
    }


# -- one regime -------------------------------------------------------------------------------


def trained(photos: Photos, regime: str, folder: Path) -> Adapter:
    """The exits of a regime, with a shortlist; those in the folder, if they are whole.

    No gates: they guess where a score reaches 0.9, and most captions' tokens leave below that.
    """
    if (folder / "adapter.json").is_file():
        adapter = Adapter.load(folder, photos.backbone)
        if "seconds" in adapter.metrics:
            return adapter
    sizes = photos.sizes
    config = TrainConfig(
        depths=photos.depths, steps=sizes.steps, patience=None, learning_rate=5e-4,
        evaluate_every=max(1, sizes.steps // 12), max_new_tokens=LONGEST["captions"],
        shortlist=min(SHORTLIST, photos.backbone.vocabulary), **REGIMES[regime],
    )  # fmt: skip
    began = time.perf_counter()
    processor = photos.encoder.processor
    resume = (folder / "training").is_dir()
    trainer = Trainer(photos.backbone, processor, photos.train, config, folder)
    adapter = trainer.run(resume=resume, kept=photos.stores)
    seconds = time.perf_counter() - began
    adapter = replace(adapter, metrics={**adapter.metrics, "seconds": round(seconds)})
    adapter.save(folder)
    return adapter


def measured(photos: Photos, regime: str, folder: Path) -> dict[str, Any]:
    """What a regime's exits are worth at several thresholds."""
    adapter = trained(photos, regime, folder)
    whole = _tried(photos, adapter)
    path = _path(photos, adapter, whole)
    chosen = {f"CIDEr drop {drop:.0%}": _fastest(path, drop) for drop in DROPS}
    targets = photos.sizes.targets
    promises = {f"risk {t:.0%}": _promised(photos, adapter, whole, t) for t in targets}
    policies = {n: replace(whole.policy, thresholds=t) for n, t in chosen.items() if t}
    policies |= {n: found.policy for n, found in promises.items() if found.policy.thresholds}
    policies[ALWAYS] = replace(
        whole.policy, thresholds=dict.fromkeys(adapter.exits.depths[:1], 0.0)
    )
    timings = _race(photos, adapter, policies)
    rows = []
    for name in (*chosen, *promises, ALWAYS):
        row: dict[str, Any] = {"chosen_by": name}
        if name in promises:
            found = promises[name]
            row |= {
                "risk_target": found.target, "confidence": found.confidence, "risk": found.risk,
                "risk_bound": found.bound, "n_calibration": found.n, "reason": found.reason,
            }  # fmt: skip
        policy = policies.get(name)
        rows.append({**row, **(_row(photos, adapter, policy, timings, name) if policy else OFF)})
    return {
        "regime": regime,
        "training_seconds": adapter.metrics.get("seconds"),
        "agreement": adapter.metrics["agreement"],
        "checks": dict(adapter.exits.measured),
        "path": path,
        "points": rows,
        "full_vs_generate": speedup(timings["generate"].decode, timings["full"].decode),
    }


ALWAYS = "every token at the exit"
OFF = {"thresholds": {}, "speedup_decode": 1.0, "speedup_end_to_end": 1.0, "cider_drop": 0.0}


def _tried(photos: Photos, adapter: Adapter) -> ThresholdEvaluator:
    """Captions of the choosing half, with what the exits say along the full model's."""
    examples = photos.part("captions", 0)
    one = photos.encoder.prompts(examples[:1])
    shortlist = adapter.policy.shortlist
    costs = measure_costs(photos.backbone, one, adapter.exits, shortlist=shortlist, repeats=3)
    policy = replace(adapter.policy, thresholds={})
    whole = ThresholdEvaluator.of(
        adapter, photos.encoder, examples, policy, RISKS["disagreement"],
        costs=costs, max_new_tokens=LONGEST["captions"],
    )  # fmt: skip
    # Decoded in batches either way; where a replay sees no difference, rounding hardly makes one.
    return replace(whole, doubtful=whole.doubtful & False)


def _path(photos: Photos, adapter: Adapter, whole: ThresholdEvaluator) -> list[dict[str, Any]]:
    """CIDEr on the choosing half along the path, as long as it does not fall too far."""
    path, _ = path_of(whole, THRESHOLDS)
    full, never = cider(photos.full["captions", 0], whole.examples), whole.seconds({})
    found = []
    for thresholds in tqdm(path, "thresholds", disable=None, leave=False):
        policy = replace(whole.policy, thresholds=thresholds)
        answers = photos.answers(adapter.with_policy(policy), "captions", whole.examples)
        drop = 1 - cider(answers, whole.examples) / full
        faster = never / whole.seconds(thresholds)
        row = {"thresholds": {str(d): t for d, t in thresholds.items()}}
        found.append({**row, "cider_drop": drop, "predicted_speedup": faster})
        print(f"  {found[-1]}", file=sys.stderr)
        if drop > 2 * max(DROPS):
            break
    return found


def _fastest(path: list[dict[str, Any]], limit: float) -> dict[int, float]:
    """The fastest thresholds whose captions lose at most so much CIDEr; none, if none do."""
    good = [row for row in path if row["cider_drop"] <= limit]
    best = max(good, key=lambda row: row["predicted_speedup"], default={"thresholds": {}})
    return {int(d): t for d, t in best["thresholds"].items()}


def _promised(photos: Photos, adapter: Adapter, whole: ThresholdEvaluator, target: float) -> Any:
    """Thresholds promised without labels: captions as like the full model's as asked."""
    return calibrate(
        adapter, photos.encoder, whole.examples, whole.policy, target=target,
        confidence=CONFIDENCE, risk="consistency", costs=whole.costs, thresholds=THRESHOLDS,
        max_new_tokens=LONGEST["captions"],
    )  # fmt: skip


OPTIONS: dict[str, Any] = {"max_new_tokens": LONGEST["captions"], "do_sample": False}


def _race(photos: Photos, adapter: Adapter, policies: dict[str, ExitPolicy]) -> dict[str, Timing]:
    """Interleaved timing on captions of the measuring half."""
    own = partial(exit_generate_fn, photos.backbone, adapter.exits, **OPTIONS)
    ways: dict[str, GenerateFn] = {
        "generate": stock_generate_fn(photos.backbone, **OPTIONS),
        "full": exit_generate_fn(photos.backbone, **OPTIONS),
        **{name: own(policy) for name, policy in policies.items()},
    }
    bar = partial(tqdm, desc="timing", disable=None, leave=False)
    return time_interleaved(ways, photos.timed, rounds=photos.sizes.rounds, progress=bar)


def _row(
    photos: Photos, adapter: Adapter, policy: ExitPolicy, timings: dict[str, Timing], name: str
) -> dict[str, Any]:
    """What thresholds give on the measuring half."""
    ours = adapter.with_policy(policy)
    captions, questions = photos.part("captions", 1), photos.part("questions", 1)
    early = photos.answers(ours, "captions", captions)
    scores = caption_measures([a.text for a in early], captions, METRICS)
    texts = [a.text for a in photos.full["captions", 1]]
    full = caption_measures(texts, captions, ("CIDEr",))["CIDEr"]
    low, high = interval(scores["CIDEr"], minus=full) or (float("nan"),) * 2
    asked = photos.answers(ours, "questions", questions)
    right = [accuracy([a.text for a in some], questions)
             for some in (photos.full["questions", 1], asked)]  # fmt: skip
    return {
        "thresholds": {str(d): t for d, t in policy.thresholds.items()},
        "gates": {str(d): g for d, g in policy.gates.items() if d in policy.thresholds},
        "speedup_decode": speedup(timings["full"].decode, timings[name].decode),
        "speedup_end_to_end": speedup(timings["full"].seconds, timings[name].seconds),
        "speedup_vs_generate": speedup(timings["generate"].decode, timings[name].decode),
        "cider_full": full.value,
        "cider": scores["CIDEr"].value,
        "cider_drop": 1 - scores["CIDEr"].value / full.value,
        "cider_drop_interval": [-high / full.value, -low / full.value],
        "bleu_4": scores["Bleu_4"].value,
        "meteor": scores["METEOR"].value,
        "rouge_l": scores["ROUGE_L"].value,
        "inconsistency_test": float(
            RISKS["consistency"].losses(early, photos.full["captions", 1], captions).mean()
        ),
        "daquar_accuracy_full": right[0],
        "daquar_accuracy": right[1],
        "n_test": len(captions),
        "n_questions": len(questions),
    }


# -- what is asked of the first regime alone --------------------------------------------------


def lossless(photos: Photos, adapter: Adapter, examples: Sequence[Example]) -> dict[str, Any]:
    """Speed, and whether the captions of `examples` are the full model's, each decoded alone."""
    drafting = draft_speeds(adapter, photos.drafted, thresholds=DRAFTS, **OPTIONS)
    policy = replace(adapter.policy, lossless=True, drafts=drafting[0].thresholds)
    timings = _race(photos, adapter, {"lossless": policy})
    same, drafted, kept = 0, 0, 0
    for example in tqdm(examples, "lossless", disable=None, leave=False):
        prompt = photos.encoder.prompts([example])
        made = adapter.generate(prompt, policy=policy, **OPTIONS)
        full = photos.none.generate(prompt, policy=FULL, **OPTIONS)
        same += bool(torch.equal(made.sequences, full.sequences))
        drafted += sum(n for n, _ in made.rounds)
        kept += sum(n for _, n in made.rounds)
    return {
        "dtype": str(photos.backbone.dtype).removeprefix("torch."),
        "speedup_decode": speedup(timings["full"].decode, timings["lossless"].decode),
        "speedup_end_to_end": speedup(timings["full"].seconds, timings["lossless"].seconds),
        "speedup_vs_generate": speedup(timings["generate"].decode, timings["lossless"].decode),
        "tokens_per_second": {name: one.tokens_per_second for name, one in timings.items()},
        "identical": same == len(examples),
        "identical_captions": same,
        "captions": len(examples),
        "acceptance": kept / max(1, drafted),
        "drafts": {str(d): t for d, t in policy.drafts.items()},
    }


def damaged(photos: Photos, adapter: Adapter) -> dict[str, Any]:
    """CIDEr on damaged photographs, full and early."""
    found: dict[str, Any] = {}
    some = photos.part("captions", 1)[: photos.sizes.damaged]
    for name in CORRUPTIONS:
        examples = [corrupted(e, name, SEVERITY, seed=0) for e in some]
        full = cider(photos.answers(photos.none, "captions", examples), examples)
        early = cider(photos.answers(adapter, "captions", examples), examples)
        found[name] = {"cider_full": full, "cider": early, "cider_drop": 1 - early / full}
    return found


def shipped(adapter: Adapter, found: dict[str, Any]) -> Adapter:
    """What is needed to leave by the first policy that was found: its exits, no discriminators.

    Raises:
        InputError: none of the policies leaves early.
    """
    chosen = (row for row in found["points"] if row["chosen_by"] != ALWAYS)
    row = next((row for row in chosen if row["thresholds"]), None)
    if row is None:
        raise InputError("These exits have no thresholds that keep what was asked.", "Train on.")
    thresholds = {int(d): t for d, t in row["thresholds"].items()}
    gates = {int(d): g for d, g in row["gates"].items()}
    policy = replace(adapter.policy, thresholds=thresholds, gates=gates)
    exits = Exits(adapter.backbone, sorted(thresholds)).to(adapter.backbone.dtype)
    for depth in exits.depths:
        exits.at(depth).load_state_dict(adapter.exits.at(depth).state_dict())
    agreement = {str(d): adapter.metrics["agreement"][str(d)] for d in exits.depths}
    return replace(
        adapter,
        exits=replace(adapter.exits, modules=exits, discriminators=None),
        policy=policy,
        metrics={**adapter.metrics, "agreement": agreement},
        calibration=None,
    )


def curves(photos: Photos, adapter: Adapter, out: Path) -> dict[str, Any]:
    """Every depth with and without trained exits, and overthinking, on the measuring half."""
    path = out / RESULT
    if not path.is_file():
        config = AnalysisConfig(
            decode_depths=photos.depths, max_new_tokens=LONGEST["captions"], resamples=200
        )
        some = photos.part("captions", 1)[: photos.sizes.damaged]
        bar = partial(tqdm, desc="depths", disable=None, leave=False)
        analyse(adapter, photos.encoder, some, config, out=out, progress=bar)
    found = read_json(path)
    return {name: found[name] for name in ("teacher_forced", "free_running", "overthinking")}


# -- all of it --------------------------------------------------------------------------------


def first_of_all(photos: Photos, precise: Callable[[], Photos], regime: str, out: Path) -> Adapter:
    """Measure what is asked of one regime alone, each part once; its exits as they are shipped.

    precise: loads the same in float32, where likely tokens do not tie as they do in bfloat16, where
        rounding picks one of them.
    """
    exits = out / "exits" / _slug(regime)
    adapter = Adapter.load(exits, photos.backbone)
    early = shipped(adapter, read_json(out / f"{_slug(regime)}.json"))
    write_json(out / "first.json", regime)

    def lossless_exactly() -> dict[str, Any]:
        other = precise()
        return lossless(other, Adapter.load(exits, other.backbone), other.held["captions"])

    parts: dict[str, Callable[[], Any]] = {
        "analysis": lambda: curves(photos, adapter, out / "analysis"),
        "lossless_bfloat16": lambda: lossless(photos, adapter, photos.held["captions"][:300]),
        "lossless": lossless_exactly,
    }
    for name, measure in parts.items():
        if not (out / f"{name}.json").is_file():
            write_json(out / f"{name}.json", measure())
            print(name, read_json(out / f"{name}.json"), file=sys.stderr)
    drafts = {int(d): t for d, t in read_json(out / "lossless.json")["drafts"].items()}
    return early.with_policy(replace(early.policy, drafts=drafts))


def assemble(work: Path, depths: Sequence[int]) -> dict[str, Any]:
    """The record, of what has been measured so far."""
    found: dict[str, Any] = {"full": read_json(work / "measured-whole" / "full.json")}
    for size, name in (("whole", "regimes"), ("small", "matched")):
        files = {r: work / f"measured-{size}" / f"{_slug(r)}.json" for r in REGIMES}
        found[name] = {r: read_json(file) for r, file in files.items() if file.is_file()}
    place = work / "measured-whole"
    files = {r: place / f"damaged-{_slug(r)}.json" for r in REGIMES}
    found["damaged"] = {r: read_json(file) for r, file in files.items() if file.is_file()}
    for name in ("first", "lossless", "lossless_bfloat16", "analysis"):
        file = place / f"{name}.json"
        found[name] = read_json(file) if file.is_file() else None
    sizes = {"sizes": vars(SIZES["whole"]), "matched_sizes": vars(SIZES["small"])}
    return {**found, "depths": list(depths), **sizes, "provenance": provenance(0, sys.argv, None)}


@command
def main() -> None:
    parser = parser_of("measure", "--regimes unsupervised", str(__doc__), "data", "work")
    parser.add_argument(
        "--regimes", nargs="+", default=list(REGIMES), metavar="REGIME",
        help="with --size whole, more is measured of the first one (default: all)",
    )  # fmt: skip
    parser.add_argument("--depths", type=int, nargs="+", default=(8,), help="of the exits")
    parser.add_argument(
        "--size", choices=SIZES, default="whole",
        help="small: to hold regimes against each other; quick: only to try it out",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("benchmarks/records/photo.json"))
    parser.add_argument(
        "--ship", type=Path, metavar="FOLDER", help="save the first regime's exits there"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.regimes) - set(REGIMES):
        raise InputError(
            f"Regime {', '.join(sorted(unknown))} is not known.", f"Known: {', '.join(REGIMES)}."
        )
    work, size = arguments.work, arguments.size
    place, model = work / f"measured-{size}", work / "model"

    def photographs(dtype: Any) -> Photos:
        return Photos(load(model, dtype), arguments.data, SIZES[size], arguments.depths)

    photos = photographs("auto")
    if not (place / "full.json").is_file():
        write_json(place / "full.json", full_figures(photos))
    for regime in arguments.regimes:
        file = place / f"{_slug(regime)}.json"
        if not file.is_file():
            write_json(file, measured(photos, regime, place / "exits" / _slug(regime)))
        print(read_json(file), file=sys.stderr)
        worn = place / f"damaged-{_slug(regime)}.json"
        if size != "small" and not worn.is_file():
            adapter = Adapter.load(place / "exits" / _slug(regime), photos.backbone)
            write_json(worn, damaged(photos, shipped(adapter, read_json(file))))
    if size != "small":
        first = arguments.regimes[0]
        early = first_of_all(photos, lambda: photographs(torch.float32), first, place)
        if arguments.ship is not None:
            early.save(arguments.ship)
    if size != "quick":
        write_json(arguments.out, assemble(work, arguments.depths))


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.replace("%", "")).strip("-")


if __name__ == "__main__":
    main()
