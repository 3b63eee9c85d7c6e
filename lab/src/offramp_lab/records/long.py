"""Trust where answers are long; rewrites long.json.

SmolLM2-135M-Instruct with an exit as in `offramp_lab.records.text`, trained on longer answers,
writes up to 96 tokens to prompts that training has not seen: at full depth, losslessly, and by
levels of trust. Inside llama.cpp, q8_0, one thread; CPU seconds, all ways in turns; half an hour.
What is in runs/long is taken from there.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from offramp_llama_cpp import LlamaCppRuntime, export_gguf
from offramp_photo.packages import LANGUAGE, weights_file

from offramp.adapter.adapter import Adapter
from offramp.common.folders import cache_folder
from offramp.core.decoding.policy import FULL, ExitPolicy
from offramp.evaluation.statistics import interval, mean_of
from offramp.features.input_processor import InputProcessor
from offramp.inputs.example import Example
from offramp_lab.experiments.experiment import identical, times
from offramp_lab.experiments.factors import DECODING, LOSSLESS, Measured
from offramp_lab.records.alone import ENGINE
from offramp_lab.records.photographs.opened import Stages, torch_way
from offramp_lab.records.record import Record, Turns, words
from offramp_lab.records.text import DEPTH
from offramp_lab.records.walk import THINGS, Parts, Walk, loaded, write_model, written

RECORD = Record("long")
NEW, MOST = 96, 4
"""Tokens of an answer, and drafts of a round, at most."""
TRUST = (0.8, 0.4, 0.1, 0.0)
PARTS: Parts = {"train": (THINGS[:76], 240), "held": (THINGS[98:], 60)}


def figures(arguments: Namespace) -> dict[str, Any]:
    work = RECORD.work
    prompts = written(work, PARTS)
    write_model(weights_file(LANGUAGE, cache_folder("photo")), work / "model")
    walk = Walk(work)
    trained = [walk.step(name, told) for name, told in commands(arguments.steps).items()]
    adapter, encoder = loaded(work)
    held = [Example.of_text(text, key=text) for text in prompts["held"][: arguments.prompts]]
    if not (work / "q8_0").is_dir():
        export_gguf(adapter, work / "q8_0", "q8_0")
    runtime, stages = LlamaCppRuntime(adapter, work / "q8_0", engine=ENGINE), Stages()
    ways = {
        name: partial(torch_way(stages, encoder, runtime, policy), most=NEW)
        for name, policy in policies(adapter.policy).items()
    }
    with stages.of_entries():
        told = Turns(work / "answers.jsonl").answers(ways, held, "prompts")
    return {
        "prompts": {name: len(lines) for name, lines in prompts.items()},
        "timed": len(held),
        "new_tokens": NEW,
        "max_draft": MOST,
        "exit": trained[-1]["said"],
        "ways": entries(told, partial(likelihood, adapter, encoder), held),
    }


def commands(steps: int) -> dict[str, list[str]]:
    """The exit learns its layer, and then, in a quarter of the steps, to draft on."""
    work = RECORD.work
    given = (work / "model", work / "train.txt", NEW)
    how = "--backbone {} --data {} --dtype float32 --batch-size 4 --max-new-tokens {} --json"
    layer = "--depths {} --exit-kind layer --shortlist 4096 --steps {} --out {}"
    drafts = "--drafting {} --steps {} --out {}"
    return {
        "train": words(f"{how} {layer}", *given, DEPTH, steps, work / "layer"),
        "train drafting": words(
            f"{how} {drafts}", *given, work / "layer", steps // 4, work / "exits"
        ),
    }


def policies(policy: ExitPolicy) -> dict[str, ExitPolicy]:
    """By way; rounds of all are equally long. policy: of the exit as it was trained."""
    policy = replace(policy, thresholds={}, drafts={DEPTH: 0.0}, max_draft=MOST)
    return {
        "full": FULL,
        LOSSLESS: replace(policy, lossless=True),
        **{f"trust {level:g}": replace(policy, trust=level) for level in TRUST},
    }


def entries(told: Any, judge: Any, held: Sequence[Example]) -> list[dict[str, Any]]:
    """Of each way, how many times as fast as full depth it is, whole and in decoding; the share of
    answers that differ, and of full depth's tokens that stand before the first that does; mean
    tokens, how many answers end by themselves, and the mean log-likelihood of a token for the full
    model, with its difference from full depth's. Intervals are 95%, paired."""
    every = {
        name: Measured.of(
            rows, {"fit": [judge(one, ids) for one, (ids, _) in zip(held, rows, strict=True)]}
        )
        for name, rows in told.items()
    }
    full, found = every["full"], list[dict[str, Any]]()
    for name, own in every.items():
        counted = own if name == "full" else own.drafted(full)
        stand = sum(map(agreeing, own.answers, full.answers))
        fit, theirs = mean_of(own.scores["fit"]), mean_of(full.scores["fit"])
        found.append(
            {
                "way": name,
                "whole": times(own.rates(), full.rates()),
                "decoding": times(counted.rates(DECODING), full.rates(DECODING)),
                "changed": 1 - float(identical(own.answers, full.answers).mean()),
                "agree": stand / sum(full.tokens),
                "tokens": float(np.mean(own.tokens)),
                "ended": sum(n < NEW for n in own.tokens),
                "fit": fit.value,
                "minus_full": fit.value - theirs.value,
                "difference": interval(fit, minus=theirs),
            }
        )
    return found


def agreeing(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(one, other, strict=False)))


def likelihood(
    adapter: Adapter, encoder: InputProcessor, example: Example, ids: Sequence[int]
) -> float:
    """The mean log-likelihood of an answer's tokens for the full model."""
    prompt = encoder.prompts([example])["input_ids"][0]
    answer = torch.tensor([*ids])
    with torch.inference_mode():
        logits = adapter.backbone.model(torch.cat([prompt, answer])[None]).logits[0]
    said = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return float(said[torch.arange(len(answer)), answer].mean())


if __name__ == "__main__":
    RECORD.run(__doc__, figures, steps=800, prompts=42)
