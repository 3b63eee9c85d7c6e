"""One regime: its exits trained, their thresholds chosen on one half, measured on the other."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from examples.photo_vlm.evaluate import LONGEST, METRICS, accuracy, caption_measures
from examples.photo_vlm.held_out import (
    CONFIDENCE,
    DROPS,
    REGIMES,
    SHORTLIST,
    THRESHOLDS,
    Photos,
    cider,
)
from offramp.adapter.adapter import Adapter
from offramp.calibration.attempts import images_of
from offramp.calibration.calibrate import calibrate
from offramp.calibration.profiler import measure_costs
from offramp.calibration.risk_functions import RISKS
from offramp.calibration.threshold_evaluator import ThresholdEvaluator, path_of, split_images
from offramp.core.decoding.policy import ExitPolicy
from offramp.evaluation.statistics import interval
from offramp.evaluation.timing import (
    GenerateFn,
    Timing,
    exit_generate_fn,
    speedup,
    speedups,
    stock_generate_fn,
    time_interleaved,
)
from offramp.inputs.example import Example
from offramp.training.config import FREE, TrainConfig
from offramp.training.trainer import Trainer


def trained(photos: Photos, regime: str, folder: Path) -> Adapter:
    """The exits of a regime, with a shortlist; those in the folder, if they are whole."""
    if (folder / "adapter.json").is_file():
        adapter = Adapter.load(folder, photos.backbone)
        if "seconds" in adapter.metrics:
            return adapter
    sizes = photos.sizes
    config = TrainConfig(
        exit_kind="layer",
        depths=photos.depths,
        steps=sizes.steps,
        patience=None,
        learning_rate=5e-4,
        evaluate_every=max(1, sizes.steps // 12),
        max_new_tokens=LONGEST["captions"],
        shortlist=min(SHORTLIST, photos.backbone.vocabulary),
        **{**FREE, **REGIMES[regime]},
    )
    began = time.perf_counter()
    processor = photos.encoder.processor
    resume = (folder / "training").is_dir()
    trainer = Trainer(photos.backbone, processor, photos.train, config, folder)
    adapter = trainer.run(resume=resume, recorded=photos.stores)
    seconds = time.perf_counter() - began
    adapter = replace(adapter, metrics={**adapter.metrics, "seconds": round(seconds)})
    adapter.save(folder)
    return adapter


def measured(photos: Photos, regime: str, folder: Path, regimes: int) -> dict[str, Any]:
    """What a regime's exits are worth at several thresholds. regimes: how many are tried on the
    same photographs."""
    adapter = trained(photos, regime, folder)
    whole = _evaluator(photos, adapter)
    path = _path(photos, adapter, whole)
    chosen = {f"CIDEr drop {drop:.0%}": _fastest(path, drop) for drop in DROPS}
    targets = photos.sizes.targets
    tried = regimes * (len(targets) + 1)  # on the same photographs
    how: dict[str, Any] = {"candidates": tried, "confidence": CONFIDENCE, "costs": whole.costs}
    how |= {"thresholds": THRESHOLDS, "max_new_tokens": LONGEST["captions"]}
    guaranteed = partial(calibrate, adapter, photos.encoder, policy=whole.policy, **how)
    # Without labels: captions as like the full model's as asked.
    guarantees = {
        f"risk {t:.0%}": guaranteed(examples=whole.examples, target=t, risk="consistency")
        for t in targets
    }
    # What ships: of captions and answers, ROUGE-L falls by at most so much, first tokens having a
    # threshold of their own, so that a prompt may wait.
    guarantees[PROMISE] = guaranteed(
        examples=promised_of(photos), target=DROP_ROUGE, risk="rouge_l_drop", first="auto"
    )
    policies = {n: replace(whole.policy, thresholds=t) for n, t in chosen.items() if t}
    policies |= {
        n: calibration.policy
        for n, calibration in guarantees.items()
        if calibration.policy.thresholds
    }
    policies[ALWAYS] = replace(
        whole.policy, thresholds=dict.fromkeys(adapter.exits.depths[:1], 0.0)
    )
    timings = timings_of(photos, adapter, policies)
    rows = []
    for name in (*chosen, *guarantees, ALWAYS):
        row: dict[str, Any] = {"chosen_by": name}
        if name in guarantees:
            calibration = guarantees[name]
            row |= {
                "risk_target": calibration.target,
                "confidence": calibration.confidence,
                "risk": calibration.risk,
                "risk_bound": calibration.bound,
                "n_calibration": calibration.n,
                "reason": calibration.reason,
            }
        if name == PROMISE:
            row["calibration"] = guarantees[name].to_json()
            row["attempts"] = [attempt.to_json() for attempt in guarantees[name].attempts]
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
DROP_ROUGE = 0.03
PROMISE = f"ROUGE-L drop {DROP_ROUGE:.0%}"
OFF = {"thresholds": {}, "speedup_decode": 1.0, "speedup_end_to_end": 1.0, "cider_drop": 0.0}


def _evaluator(photos: Photos, adapter: Adapter) -> ThresholdEvaluator:
    """Captions of the choosing half, with what the exits say along the full model's."""
    examples = photos.part("captions", 0)
    prompt = photos.encoder.prompts(examples[:1])
    shortlist = adapter.policy.shortlist
    costs = measure_costs(photos.backbone, prompt, adapter.exits, shortlist=shortlist, repeats=3)
    policy = replace(adapter.policy, thresholds={})
    whole = ThresholdEvaluator.of(
        adapter,
        photos.encoder,
        examples,
        policy,
        RISKS["disagreement"],
        costs=costs,
        max_new_tokens=LONGEST["captions"],
    )
    # Decoded in batches either way; where a replay sees no difference, rounding hardly makes one.
    return replace(whole, doubtful=whole.doubtful & False)


def _path(photos: Photos, adapter: Adapter, whole: ThresholdEvaluator) -> list[dict[str, Any]]:
    """CIDEr on the choosing half along the path, as long as it does not fall too far."""
    search, _ = split_images(whole, images_of(whole.examples))
    path = path_of(whole, search, THRESHOLDS)
    full, never = cider(photos.full["captions", 0], whole.examples), whole.seconds({})
    rows = []
    for thresholds in tqdm(path, "thresholds", disable=None, leave=False):
        policy = replace(whole.policy, thresholds=thresholds)
        answers = photos.answers(adapter.with_policy(policy), "captions", whole.examples)
        drop = 1 - cider(answers, whole.examples) / full
        early = whole.seconds(thresholds)
        assert never and early, "the costs were measured"
        faster = never / early
        row = {"thresholds": {str(d): t for d, t in thresholds.items()}}
        rows.append({**row, "cider_drop": drop, "predicted_speedup": faster})
        print(f"  {rows[-1]}", file=sys.stderr)
        if drop > 2 * max(DROPS):
            break
    return rows


def _fastest(path: list[dict[str, Any]], limit: float) -> dict[int, float]:
    """The fastest thresholds whose captions lose at most so much CIDEr; none, if none do."""
    good = [row for row in path if row["cider_drop"] <= limit]
    nothing: dict[str, Any] = {"thresholds": {}}
    best = max(good, key=lambda row: float(row["predicted_speedup"]), default=nothing)
    return {int(d): t for d, t in best["thresholds"].items()}


def promised_of(photos: Photos) -> list[Example]:
    """What the thresholds that ship are calibrated on."""
    return [*photos.part("captions", 0), *photos.part("questions", 0)]


OPTIONS: dict[str, Any] = {"max_new_tokens": LONGEST["captions"], "do_sample": False}


def timings_of(
    photos: Photos, adapter: Adapter, policies: dict[str, ExitPolicy]
) -> dict[str, Timing]:
    """Interleaved timing on captions of the measuring half."""
    methods: dict[str, GenerateFn] = {
        "generate": stock_generate_fn(photos.backbone, **OPTIONS),
        "full": exit_generate_fn(photos.backbone, **OPTIONS),
    }
    methods |= {
        name: exit_generate_fn(photos.backbone, adapter.exits, policy, **OPTIONS)
        for name, policy in policies.items()
    }
    bar = partial(tqdm, desc="timing", disable=None, leave=False)
    return time_interleaved(methods, photos.timed, rounds=photos.sizes.rounds, progress=bar)


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
    right = [
        accuracy([a.text for a in answers], questions)
        for answers in (photos.full["questions", 1], asked)
    ]
    return {
        "thresholds": {str(d): t for d, t in policy.thresholds.items()},
        "first": {str(d): t for d, t in (policy.first or {}).items()},
        **speedups(timings, name),
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
