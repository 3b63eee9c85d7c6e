"""Which answers are the same in which runtime and mode, and what they are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from offramp.answers import Answer
from offramp.data.example import Example
from offramp.engine.policy import MODES
from offramp.evaluation.caption_metrics import caption_scores
from offramp.evaluation.statistics import Measure, interval
from offramp_lab.experiments.experiment import same
from offramp_lab.records.record import Kept
from offramp_lab.records.runtimes.kept import KeptRuntime
from offramp_lab.records.runtimes.methods import (
    FORMATS,
    IN_LLAMA,
    IN_TORCH,
    OPTIONS,
    WAY,
    Bench,
    Name,
)

LONGEST: dict[str, Any] = {"max_new_tokens": OPTIONS["max_new_tokens"]}
AT_ONCE = 20
"""Photographs that PyTorch answers in a batch, where a row gets what it gets alone."""


def kept_answers(bench: Bench) -> Kept:
    """All that was ever answered."""
    return Kept(bench.out / "answers.jsonl")


def in_torch(bench: Bench, kept: Kept) -> KeptRuntime:
    """The adapter in PyTorch, float32."""
    depth = bench.adapter.backbone.depth
    return KeptRuntime(bench.adapter, "torch float32", depth, kept, rows=AT_ONCE)


def in_llama(bench: Bench, layers: str, kept: Kept) -> KeptRuntime:
    """The same in llama.cpp."""
    runtime = bench.runtime(layers)
    return KeptRuntime(runtime, runtime.name, bench.adapter.backbone.depth, kept)


def answers(bench: Bench) -> dict[str, Any]:
    """Which answers are the same, and what they are worth. What is answered already is kept."""
    kept, policies = kept_answers(bench), bench.policies
    sources = {(IN_TORCH, "float32"): in_torch(bench, kept)}
    sources |= {(IN_LLAMA, layers): in_llama(bench, layers, kept) for layers in FORMATS}
    given: dict[Name, list[Answer]] = {(*source, mode): [] for source in sources for mode in MODES}
    del given[IN_TORCH, "float32", "lossless"]
    photographs = bench.photographs
    for start in tqdm(range(0, len(photographs), AT_ONCE), "answers", disable=None):
        some = photographs[start : start + AT_ONCE]
        for (runtime, layers, mode), said in given.items():
            source = sources[runtime, layers]
            said.extend(source.answers(bench.encoder, some, policies[mode], **LONGEST))
    return compare(bench, given)


def compare(bench: Bench, given: Mapping[Name, Sequence[Answer]]) -> dict[str, Any]:
    """Counts of identical answers, and CIDEr. given: to each photograph."""
    ids = {name: [answer.ids for answer in answers] for name, answers in given.items()}
    full, early = (ids[IN_TORCH, "float32", mode] for mode in ("full", "early_exit"))

    def in_format(layers: str) -> dict[str, int]:
        own = {mode: ids[IN_LLAMA, layers, mode] for mode in MODES}
        return {
            "lossless_as_full": same(own["lossless"], own["full"]),
            "early_as_full": same(own["early_exit"], own["full"]),
            "early_as_float32_early": same(own["early_exit"], early),
            "full_as_float32_full": same(own["full"], full),
        }

    whole = cider(given[IN_TORCH, "float32", "full"], bench.photographs)
    return {
        "photographs": len(bench.photographs),
        "identical": {layers: in_format(layers) for layers in FORMATS},
        "float32": {"early_as_full": same(early, full)},
        "cider": [
            dict(zip(WAY, name, strict=True)) | worth(cider(answers, bench.photographs), whole)
            for name, answers in given.items()
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
