"""Which answers are the same in which runtime and mode, and what they are worth; what was answered
once is kept in a file, and not asked again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from transformers import StoppingCriteriaList

from offramp.core.decoding.policy import MODES
from offramp.evaluation.caption_metrics import caption_scores
from offramp.evaluation.statistics import Measure, interval
from offramp.evaluation.timing import GenerateFn
from offramp.inputs.example import Example
from offramp_lab.experiments.experiment import same
from offramp_lab.records.record import Kept
from offramp_lab.records.runtimes.methods import FORMATS, IN_LLAMA, IN_TORCH, WAY, Bench
from offramp_lab.records.subjects import text_of

Ids = Sequence[Sequence[int]]
"""Of an answer to each photograph."""


def ids_by(method: GenerateFn, inputs: Any) -> list[int]:
    """The answer of one method."""
    found: list[int] = method(inputs, StoppingCriteriaList()).tolist()
    return found


def answers(bench: Bench) -> dict[str, Any]:
    """Counts of identical answers, and CIDEr."""
    photographs, encoder = bench.photographs, bench.encoder
    ways = {
        name: partial(ids_by, method)
        for name, method in bench.methods().items()
        if name[0] in (IN_TORCH, IN_LLAMA) and name != (IN_TORCH, "float32", "lossless")
    }
    kept = Kept(bench.out / "answers.jsonl")
    said = kept.answers(ways, photographs, lambda one: encoder.prompts([one]), "answers")
    full, early = (said[IN_TORCH, "float32", mode] for mode in ("full", "early_exit"))

    def in_format(layers: str) -> dict[str, int]:
        own = {mode: said[IN_LLAMA, layers, mode] for mode in MODES}
        return {
            "lossless_as_full": same(own["lossless"], own["full"]),
            "early_as_float32_early": same(own["early_exit"], early),
            "full_as_float32_full": same(own["full"], full),
        }

    whole = cider(full, photographs, encoder)
    return {
        "photographs": len(photographs),
        "identical": {layers: in_format(layers) for layers in FORMATS},
        "cider": [
            {**dict(zip(WAY, name, strict=True)), **worth(cider(ids, photographs, encoder), whole)}
            for name, ids in said.items()
        ],
    }


def cider(answers: Ids, examples: Sequence[Example], encoder: Any) -> Measure:
    """Against all captions of each photograph."""
    pairs = zip(examples, answers, strict=True)
    said = {example.key: text_of(encoder, ids).strip() for example, ids in pairs}
    right = {example.key: example.answers for example in examples}
    scored = caption_scores(said, right, metrics=("CIDEr",), tokenizer="simple")
    return scored.measures["CIDEr"]


def worth(value: Measure, whole: Measure) -> dict[str, Any]:
    """CIDEr, and the interval of its difference from another."""
    return {"CIDEr": value.value, "difference_interval": interval(value, minus=whole)}
