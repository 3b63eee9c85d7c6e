"""Train exits on the built model in several regimes, and measure what each is worth on photographs.

Photographs to train exits on are of the training splits; the held-out ones are halved, and what is
chosen on one half is measured on the other. Every regime's figures are written as soon as they are
there, and what is there is not measured again.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from examples.photo_vlm.caption import load
from examples.photo_vlm.command import command, parser_of
from examples.photo_vlm.evaluate import LONGEST, METRICS, accuracy, caption_figures
from examples.photo_vlm.fetch import WORK
from examples.photo_vlm.rows import DATA, read_photographs
from tqdm import tqdm

from offramp.adapter import Adapter
from offramp.analyse import RESULT, AnalysisConfig, analyse
from offramp.answerloss import RISKS, Answer, free_running
from offramp.calibrate import Tried, calibrate, path_of
from offramp.config import TrainConfig
from offramp.corrupt import CORRUPTIONS, corrupted
from offramp.errors import InputError
from offramp.examples import Example
from offramp.exits import Exits
from offramp.measure import Timing, Way, race, speedup
from offramp.policy import FULL, Policy
from offramp.records import provenance, read_json, write_json
from offramp.train import train
from offramp.unitcosts import measure_costs
from offramp.vision import VisionCache
from offramp.ways import own_way, stock_way

SHORTLIST = 2048
DROPS = (0.01, 0.03)
"""Relative drops of CIDEr within which the fastest thresholds are looked for."""
TARGETS, CONFIDENCE = (0.01, 0.05), 0.95
THRESHOLDS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Captions of a small model: few tokens are said with more than nine tenths of the probability."""
DRAFTS = (0.3, 0.5, 0.7, 0.85)
SEVERITY = 3

_ALONE = {"adversarial": 0.0}
_LABELS_ONLY = {"distillation": 0.0, "adversarial": 0.0}
REGIMES: dict[str, dict[str, Any]] = {
    "unsupervised": {},
    "unsupervised, distillation alone": _ALONE,
    "100% labels": {"regime": "supervised"},
    "10% labels": {"regime": "mixed", "labelled_fraction": 0.1},
    "1% labels": {"regime": "mixed", "labelled_fraction": 0.01},
    "pseudo-labels": {"regime": "pseudo"},
    "100% labels, cross-entropy alone": {"regime": "supervised", **_LABELS_ONLY},
}
"""Changes to the `TrainConfig`."""


@dataclass(frozen=True)
class Sizes:
    """Photographs with captions and questions to train exits on, steps, and examples measured."""

    captions: int = 6000
    questions: int = 1000
    steps: int = 12_000
    held_out: int = 1000
    asked: int = 600
    race: int = 20
    rounds: int = 5
    damaged: int = 200


SMALL = Sizes(captions=800, questions=400, steps=300, held_out=500, asked=300, race=12, damaged=80)
"""What one core measures of a regime in forty minutes."""


QUICK = Sizes(24, 8, 4, 16, 40, 2, 1, 8)
SIZES = {"whole": Sizes(), "small": SMALL, "quick": QUICK}


def _half(example: Example) -> int:
    """0 to choose on, 1 to measure on: by a hash of the photograph."""
    return hashlib.sha256(f"half:{example.group}".encode()).digest()[0] % 2


class Photos:
    """The built model, the photographs, and the full model's answers to them."""

    def __init__(self, folder: Path, data: Path, sizes: Sizes, depths: Sequence[int]) -> None:
        self.backbone, self.encoder = load(folder)
        self.sizes, self.depths = sizes, tuple(depths)
        splits = read_photographs(data)
        self.train = splits["captions"][: sizes.captions] + splits["questions"][: sizes.questions]
        self.held = {
            "captions": splits["captions_val"][: sizes.held_out],
            "questions": splits["questions_val"][: sizes.asked],
        }
        self.cache = VisionCache(1 << 28)

    def part(self, name: str, half: int) -> list[Example]:
        return [e for e in self.held[name] if _half(e) == half]

    def answers(self, adapter: Adapter, name: str, examples: Sequence[Example]) -> list[Answer]:
        """Free-running greedy answers by the adapter's policy."""
        options = {"max_new_tokens": LONGEST[name], "do_sample": False, "vision_cache": self.cache}
        return free_running(adapter, self.encoder, examples, adapter.policy, 64, options)

    @cached_property
    def none(self) -> Adapter:
        """The full model."""
        return Adapter(self.backbone, Exits(self.backbone, self.depths[:1], lens=True))

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
    adapter = train(photos.backbone, processor, photos.train, config, folder, resume=resume)
    seconds = time.perf_counter() - began
    adapter = replace(adapter, metrics={**adapter.metrics, "seconds": round(seconds)})
    adapter.save(folder)
    return adapter


def measured(photos: Photos, regime: str, folder: Path) -> dict[str, Any]:
    """Everything about one regime."""
    adapter = trained(photos, regime, folder)
    whole = _tried(photos, adapter)
    chosen = {f"CIDEr drop {drop:.0%}": None for drop in DROPS} | _by_drop(photos, adapter, whole)
    promises = {f"risk {t:.0%}": _promised(photos, adapter, whole, t) for t in TARGETS}
    policies = {n: p for n, p in chosen.items() if p is not None}
    policies |= {n: found.policy for n, found in promises.items() if found.policy.thresholds}
    timings, drafts = _race(photos, adapter, policies)
    rows = []
    for name in (*chosen, *promises):
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
        "checks": dict(adapter.exits.checks.found) if adapter.exits.checks else {},
        "points": rows,
        "lossless": _lossless(photos, adapter, timings, drafts),
        "full_vs_generate": speedup(timings["generate"].decode, timings["full"].decode),
        "damaged": _damaged(photos, adapter, policies.get(f"CIDEr drop {DROPS[0]:.0%}")),
    }


OFF = {"thresholds": {}, "speedup_decode": 1.0, "speedup_end_to_end": 1.0, "cider_drop": 0.0}


def _tried(photos: Photos, adapter: Adapter) -> Tried:
    """Captions of the choosing half, with what the exits say along the full model's."""
    examples = photos.part("captions", 0)
    one = photos.encoder.prompts(examples[:1])
    shortlist = adapter.policy.shortlist
    costs = measure_costs(photos.backbone, one, adapter.exits, shortlist=shortlist, repeats=3)
    options = {"max_new_tokens": LONGEST["captions"], "do_sample": False}
    policy = replace(adapter.policy, thresholds={})
    whole = Tried.of(
        adapter, photos.encoder, examples, policy, RISKS["disagreement"], 64, options, costs
    )
    # Decoded in batches either way; where a replay sees no difference, rounding hardly makes one.
    return replace(whole, doubtful=whole.doubtful & False)


def _by_drop(photos: Photos, adapter: Adapter, whole: Tried) -> dict[str, Policy | None]:
    """The fastest thresholds of the path whose captions lose at most so much CIDEr."""
    path, _ = path_of(whole, THRESHOLDS)
    full = cider(photos.full["captions", 0], whole.examples)
    found: dict[str, Policy | None] = {}
    for thresholds in tqdm(path, "thresholds", disable=None, leave=False):
        policy = replace(whole.policy, thresholds=thresholds)
        answers = photos.answers(adapter.with_policy(policy), "captions", whole.examples)
        drop = 1 - cider(answers, whole.examples) / full
        took = whole.seconds(thresholds)
        print(f"  {thresholds}: CIDEr drop {drop:+.3f}, {took}", file=sys.stderr)
        for limit in DROPS:
            name = f"CIDEr drop {limit:.0%}"
            best = found.get(name)
            if drop <= limit and (best is None or took < whole.seconds(best.thresholds)):
                found[name] = policy
        if drop > 0.08:
            break
    return found


def _promised(photos: Photos, adapter: Adapter, whole: Tried, target: float) -> Any:
    """Thresholds promised without labels: captions as like the full model's as asked."""
    return calibrate(
        adapter, photos.encoder, whole.examples, whole.policy, target=target,
        confidence=CONFIDENCE, risk="consistency", costs=whole.costs, thresholds=THRESHOLDS,
        max_new_tokens=LONGEST["captions"],
    )  # fmt: skip


def _race(
    photos: Photos, adapter: Adapter, policies: dict[str, Policy]
) -> tuple[dict[str, Timing], Policy]:
    """Interleaved timing on captions of the measuring half; and the fastest lossless policy."""
    prompts = [photos.encoder.prompts([e]) for e in photos.part("captions", 1)[: photos.sizes.race]]
    options = {"max_new_tokens": LONGEST["captions"], "do_sample": False}
    own = partial(own_way, photos.backbone, adapter.exits, **options)
    drafts = {
        t: replace(adapter.policy, thresholds=dict.fromkeys(adapter.exits.depths[:1], t),
                   lossless=True, gates={})
        for t in DRAFTS
    }  # fmt: skip
    trial = race({str(t): own(policy) for t, policy in drafts.items()}, prompts[:6], rounds=2)
    best = drafts[min(DRAFTS, key=lambda t: sum(trial[str(t)].decode))]
    ways: dict[str, Way] = {
        "generate": stock_way(photos.backbone, **options),
        "full": own_way(photos.backbone, **options),
        "lossless": own(best),
        **{name: own(policy) for name, policy in policies.items()},
    }
    bar = partial(tqdm, desc="race", disable=None, leave=False)
    return race(ways, prompts, rounds=photos.sizes.rounds, progress=bar), best


def _row(
    photos: Photos, adapter: Adapter, policy: Policy, timings: dict[str, Timing], name: str
) -> dict[str, Any]:
    """What thresholds give on the measuring half."""
    ours = adapter.with_policy(policy)
    captions, questions = photos.part("captions", 1), photos.part("questions", 1)
    early = photos.answers(ours, "captions", captions)
    scores = caption_figures([a.text for a in early], captions, METRICS)
    full = cider(photos.full["captions", 1], captions)
    asked = photos.answers(ours, "questions", questions)
    right = [accuracy([a.text for a in some], questions)
             for some in (photos.full["questions", 1], asked)]  # fmt: skip
    return {
        "thresholds": {str(d): t for d, t in policy.thresholds.items()},
        "gates": {str(d): g for d, g in policy.gates.items() if d in policy.thresholds},
        "speedup_decode": speedup(timings["full"].decode, timings[name].decode),
        "speedup_end_to_end": speedup(timings["full"].seconds, timings[name].seconds),
        "speedup_vs_generate": speedup(timings["generate"].decode, timings[name].decode),
        "cider_full": full,
        "cider": scores["CIDEr"],
        "cider_drop": 1 - scores["CIDEr"] / full,
        "bleu_4": scores["Bleu_4"],
        "meteor": scores["METEOR"],
        "rouge_l": scores["ROUGE_L"],
        "inconsistency_test": float(
            RISKS["consistency"].losses(early, photos.full["captions", 1], captions).mean()
        ),
        "daquar_accuracy_full": right[0],
        "daquar_accuracy": right[1],
        "n_test": len(captions),
        "n_questions": len(questions),
    }


def _lossless(
    photos: Photos, adapter: Adapter, timings: dict[str, Timing], policy: Policy
) -> dict[str, Any]:
    """Speed, and whether every held-out caption is the full model's, each decoded alone."""
    ours = adapter.with_policy(policy)
    options = {"max_new_tokens": LONGEST["captions"], "do_sample": False}
    same, drafted, kept, count = 0, 0, 0, 0
    for example in tqdm(photos.held["captions"], "lossless", disable=None, leave=False):
        prompt = photos.encoder.prompts([example])
        made = ours.generate(prompt, **options)
        full = photos.none.generate(prompt, policy=FULL, **options)
        same += bool(torch.equal(made.sequences, full.sequences))
        drafted += sum(n for n, _ in made.rounds)
        kept += sum(n for _, n in made.rounds)
        count += 1
    return {
        "speedup_decode": speedup(timings["full"].decode, timings["lossless"].decode),
        "speedup_end_to_end": speedup(timings["full"].seconds, timings["lossless"].seconds),
        "identical": same == count,
        "identical_captions": same,
        "captions": count,
        "acceptance": kept / max(1, drafted),
        "thresholds": {str(d): t for d, t in policy.thresholds.items()},
    }


def _damaged(photos: Photos, adapter: Adapter, policy: Policy | None) -> dict[str, Any]:
    """CIDEr on damaged photographs, full and early."""
    found: dict[str, Any] = {}
    some = photos.part("captions", 1)[: photos.sizes.damaged]
    for name in CORRUPTIONS if policy is not None else ():
        examples = [corrupted(e, name, SEVERITY, seed=0) for e in some]
        full = cider(photos.answers(photos.none, "captions", examples), examples)
        ours = adapter.with_policy(policy)
        early = cider(photos.answers(ours, "captions", examples), examples)
        found[name] = {"cider_full": full, "cider": early, "cider_drop": 1 - early / full}
    return found


def shipped(adapter: Adapter, found: dict[str, Any]) -> Adapter:
    """What is needed to leave by the first policy that was found: its exits, no discriminators.

    Raises:
        InputError: none of the policies leaves early.
    """
    row = next((row for row in found["points"] if row["thresholds"]), None)
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
        exits=exits.with_checks(adapter.exits.checks),
        policy=policy,
        discriminators=None,
        metrics={**adapter.metrics, "agreement": agreement},
        calibration=None,
    )


# -- by depth ---------------------------------------------------------------------------------


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


@command
def main() -> None:
    parser = parser_of("measure", "--regimes unsupervised --depths 8 15", str(__doc__))
    parser.add_argument("--data", type=Path, default=DATA, help="folder (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=WORK, help="folder (default: %(default)s)")
    parser.add_argument(
        "--regimes", nargs="+", default=list(REGIMES), metavar="REGIME",
        help="the first one's exits are also looked at depth by depth (default: all)",
    )  # fmt: skip
    parser.add_argument("--depths", type=int, nargs="+", default=(8, 15), help="of the exits")
    parser.add_argument("--size", choices=SIZES, default="whole", help="quick: only to try it out")
    parser.add_argument("--out", type=Path, default=Path("records/photo.json"))
    parser.add_argument(
        "--ship",
        type=Path,
        metavar="FOLDER",
        help="save the first regime's exits there, to be used",
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.regimes) - set(REGIMES):
        raise InputError(
            f"Regime {', '.join(sorted(unknown))} is not known.", f"Known: {', '.join(REGIMES)}."
        )
    photos = Photos(
        arguments.work / "model", arguments.data, SIZES[arguments.size], arguments.depths
    )  # fmt: skip
    place = arguments.work / f"measured-{arguments.size}"
    files = {name: place / f"{_slug(name)}.json" for name in ("full", *REGIMES)}
    if not files["full"].is_file():
        write_json(files["full"], full_figures(photos))
    print(read_json(files["full"]), file=sys.stderr)
    for regime in arguments.regimes:
        if not files[regime].is_file():
            exits = place / "exits" / _slug(regime)
            write_json(files[regime], measured(photos, regime, exits))
        print(read_json(files[regime]), file=sys.stderr)
    first = Adapter.load(place / "exits" / _slug(arguments.regimes[0]), photos.backbone)
    done = {name: read_json(files[name]) for name in REGIMES if files[name].is_file()}
    record = {
        "full": read_json(files["full"]),
        "regimes": done,
        "lossless": next(iter(done.values()))["lossless"] if done else None,
        "analysis": curves(photos, first, place / "analysis"),
        "depths": list(arguments.depths),
        "sizes": vars(photos.sizes),
        "provenance": provenance(0, sys.argv, None),
    }
    if arguments.ship is not None:
        shipped(first, done[arguments.regimes[0]]).save(arguments.ship)
    write_json(place / "photo.json" if arguments.size == "quick" else arguments.out, record)


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.replace("%", "")).strip("-")


if __name__ == "__main__":
    main()
