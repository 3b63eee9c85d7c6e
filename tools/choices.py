"""Measure what the defaults were chosen by, on the tiny models; writes records/choices.json.

adversary: validation agreement of one exit with the final layer, for weights of the adversarial
    term and kinds of discriminator, over seeds; all else equal, the same steps.
kv: recompute against propagate at one threshold: decoding speed against full depth, and the share
    of test answers that stay the full model's.
"""

import json
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from offramp import demo
from offramp.config import TrainConfig
from offramp.encode import Encoder
from offramp.measure import race, speedup
from offramp.policy import FULL, Policy
from offramp.records import provenance, write_json
from offramp.tiny import TINY, captions, load_tiny, questions
from offramp.train import train

OUT = Path(__file__).parent.parent / "records" / "choices.json"
SEEDS = (0, 1, 2)
GAMES = ((0.0, True), (0.01, True), (0.1, True), (0.1, False))  # weight, conditional
DEPTH, STEPS, PICTURES, THRESHOLD = 2, 400, 600, 0.9


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {"depth": DEPTH, "steps": STEPS, "pictures": PICTURES}
    for kind in TINY:
        found[kind] = {"adversary": [_game(kind, *game) for game in GAMES], "kv": _kv(kind)}
        print(json.dumps(found[kind]), file=sys.stderr)
    write_json(OUT, {**found, "provenance": provenance(None, sys.argv, None)})


def _trained(kind: str, weight: float, conditional: bool, seed: int) -> Any:
    backbone, processor = load_tiny(kind)
    config = TrainConfig(
        depths=(DEPTH,), steps=STEPS, batch_size=32, seed=seed, patience=None,
        adversarial=weight, conditional=conditional, validation_fraction=0.25,
    )  # fmt: skip
    examples = captions("train", PICTURES).examples + questions("train", PICTURES).examples
    with tempfile.TemporaryDirectory() as folder:
        return train(backbone, processor, examples, config, folder), Encoder(backbone, processor)


def _game(kind: str, weight: float, conditional: bool) -> dict[str, Any]:
    agreements = []
    for seed in SEEDS:
        adapter, _ = _trained(kind, weight, conditional, seed)
        agreements.append(adapter.metrics["agreement"][str(DEPTH)])
    return {
        "weight": weight,
        "conditional": conditional,
        "agreement": agreements,
        "mean": mean(agreements),
        "standard_deviation": stdev(agreements),
    }


def _kv(kind: str) -> dict[str, Any]:
    adapter, encoder = _trained(kind, TrainConfig.adversarial, True, 0)
    policies = {kv: Policy({DEPTH: THRESHOLD}, kv=kv) for kv in ("recompute", "propagate")}
    timed = [encoder.prompts([e]) for e in captions("test", 30).examples]
    ways = {name: demo.own_way(adapter, p) for name, p in {"full": FULL, **policies}.items()}
    timings = race(ways, timed, rounds=5)
    tasks = [captions("test", 200), questions("test", 200)]
    full = demo.answers(adapter, encoder, tasks, FULL)
    kept = {}
    for name, policy in policies.items():
        ours = demo.answers(adapter, encoder, tasks, policy)
        pairs = [(a.ids, b.ids) for t in full for a, b in zip(full[t], ours[t], strict=True)]
        kept[name] = {
            "speedup_decode": speedup(timings["full"].decode, timings[name].decode),
            "identical_answers": sum(a == b for a, b in pairs) / len(pairs),
        }
    return {"threshold": THRESHOLD, **kept}


if __name__ == "__main__":
    main()
