"""Which answers are the same in which runtime and mode, and what they are worth; what was answered
once is kept in a file, and not asked again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from offramp.adapter.answers import Answer, Model, generate_answers, generate_by
from offramp.core.decoding.policy import FULL, MODES, ExitPolicy, GenerationOutput
from offramp.evaluation.caption_metrics import caption_scores
from offramp.evaluation.statistics import Measure, interval
from offramp.features.input_processor import InputProcessor
from offramp.features.vision_cache import VisionCache
from offramp.inputs.example import Example
from offramp_lab.experiments.experiment import bar, same
from offramp_lab.records.record import Kept
from offramp_lab.records.runtimes.methods import FORMATS, IN_LLAMA, IN_TORCH, OPTIONS, WAY, Bench

LONGEST: dict[str, Any] = {"max_new_tokens": OPTIONS["max_new_tokens"]}
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


# -- what is kept ---------------------------------------------------------------------------------


class KeptRuntime:
    """A model whose answers are kept; a runtime as `offramp.adapter.answers` has it.

    rows: prompts that it answers at once. dtype: of the pixels that it reads.
    """

    def __init__(
        self,
        model: Model,
        name: str,
        layers: int,
        kept: Kept,
        *,
        rows: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.name, self.rows, self._dtype = name, rows, dtype
        self._model, self._layers, self._kept = model, layers, kept
        self._images = VisionCache(1 << 28)

    def answers(
        self, encoder: InputProcessor, examples: Sequence[Example], policy: ExitPolicy
    ) -> list[Answer]:
        """To each example."""
        return generate_answers(
            self,
            encoder,
            examples,
            policy,
            batch_size=self.rows,
            progress=bar(self.name),
            **LONGEST,
        )

    def generate(
        self, inputs: Mapping[str, Any], *, policy: ExitPolicy | None = None, **options: Any
    ) -> GenerationOutput:
        policy = FULL if policy is None else policy
        how = "lossless" if policy.lossless else str(policy.thresholds or "full depth")
        name, prompt = f"{self.name}, {how}", inputs["input_ids"]
        rows = zip(prompt, inputs["pixel_values"], strict=True)
        keys = [f"{_digest(*row)}, {name}" for row in rows]
        if any(key not in self._kept for key in keys):
            given = {**options, "vision_cache": self._images}
            pixels = inputs["pixel_values"].to(self._dtype)
            found = generate_by(self._model, {**inputs, "pixel_values": pixels}, policy, given)
            columns = (found.new_tokens, found.depths, found.scores)
            for key, *row in zip(keys, *columns, strict=True):
                self._kept.keep(key, _said(*row))
        said = [self._kept.found[key] for key in keys]
        ids, depths, scores = (_padded([row[part] for row in said]) for part in range(3))
        return GenerationOutput(
            torch.cat([prompt, ids.long()], 1), depths.long(), scores, self._layers
        )


def _digest(ids: Tensor, pixels: Tensor) -> str:
    digest = hashlib.sha256(ids.numpy().tobytes())
    digest.update(pixels.contiguous().numpy().tobytes())
    return digest.hexdigest()[:24]


def _said(ids: Tensor, depths: Tensor, scores: Tensor) -> list[list[Any]]:
    """Ids, depths and scores, padding left out; None: no score."""
    live = depths > 0
    known = [None if score != score else score for score in scores[live].tolist()]
    return [ids[live].tolist(), depths[live].tolist(), known]


def _padded(rows: Sequence[Sequence[float | None]]) -> Tensor:
    longest = max(map(len, rows))
    whole = torch.zeros(len(rows), longest, dtype=torch.float64)
    for place, row in enumerate(rows):
        values = [torch.nan if value is None else value for value in row]
        whole[place, : len(row)] = torch.tensor(values, dtype=torch.float64)
    return whole
