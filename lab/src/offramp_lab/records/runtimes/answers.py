"""Which answers are the same in which runtime and mode, and what they are worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from offramp.answers import Answer
from offramp.data.example import Example
from offramp.engine.policy import MODES
from offramp.evaluation.caption_metrics import caption_scores
from offramp.evaluation.statistics import Measure, interval
from offramp_lab.experiments.experiment import same
from offramp_lab.records.record import Kept
from offramp_lab.records.runtimes.kept import KeptRuntime
from offramp_lab.records.runtimes.methods import FORMATS, IN_LLAMA, IN_TORCH, WAY, Bench

AT_ONCE = 20
"""Photographs that PyTorch answers in a batch, where a row gets what it gets alone."""


def keeping(bench: Bench, formats: Sequence[str]) -> dict[str, KeptRuntime]:
    """By number format, PyTorch in float32 and llama.cpp in those; all that was ever answered is
    kept."""
    kept, depth = Kept(bench.out / "answers.jsonl"), bench.adapter.backbone.depth
    found = {"float32": KeptRuntime(bench.adapter, "torch float32", depth, kept, rows=AT_ONCE)}
    for layers in formats:
        runtime = bench.runtime(layers)
        found[layers] = KeptRuntime(runtime, runtime.name, depth, kept)
    return found


def answers(bench: Bench) -> dict[str, Any]:
    """Counts of identical answers, and CIDEr. What is answered already is kept."""
    policies, photographs = bench.policies, bench.photographs
    given = {
        (layers, mode): runtime.answers(bench.encoder, photographs, policies[mode])
        for layers, runtime in keeping(bench, FORMATS).items()
        for mode in MODES
        if (layers, mode) != ("float32", "lossless")
    }
    full, early = (given["float32", mode] for mode in ("full", "early_exit"))

    def in_format(layers: str) -> dict[str, int]:
        own = {mode: given[layers, mode] for mode in MODES}
        return {
            "lossless_as_full": same(own["lossless"], own["full"]),
            "early_as_full": same(own["early_exit"], own["full"]),
            "early_as_float32_early": same(own["early_exit"], early),
            "full_as_float32_full": same(own["full"], full),
        }

    whole = cider(full, photographs)
    names = {of: (IN_TORCH if of[0] == "float32" else IN_LLAMA, *of) for of in given}
    return {
        "photographs": len(photographs),
        "identical": {layers: in_format(layers) for layers in FORMATS},
        "float32": {"early_as_full": same(early, full)},
        "cider": [
            {**dict(zip(WAY, names[of], strict=True)), **worth(cider(said, photographs), whole)}
            for of, said in given.items()
        ],
    }


def cider(answers: Sequence[Answer], examples: Sequence[Example]) -> Measure:
    """Against all captions of each photograph."""
    said = {e.key: answer.text.strip() for e, answer in zip(examples, answers, strict=True)}
    right = {example.key: example.answers for example in examples}
    scored = caption_scores(said, right, metrics=("CIDEr",), tokenizer="simple")
    return scored.measures["CIDEr"]


def worth(value: Measure, whole: Measure) -> dict[str, Any]:
    """CIDEr, its drop and its difference from another with its interval."""
    return {
        "CIDEr": value.value,
        "drop": 1 - value.value / whole.value,
        "difference_interval": interval(value, minus=whole),
    }
