"""Answers that are kept in a file: what was answered before is not asked again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from examples.photo_vlm.evaluate import LONGEST as CAPTIONS
from torch import Tensor

from offramp.answers import Answer, Model, generate_answers, generate_by
from offramp.data.example import Example
from offramp.engine.policy import FULL, ExitPolicy, GenerationOutput
from offramp.models.input_processor import InputProcessor
from offramp.models.vision_cache import VisionCache
from offramp_lab.experiments.experiment import bar
from offramp_lab.records.record import Kept

LONGEST: dict[str, Any] = {"max_new_tokens": CAPTIONS["captions"]}


class KeptRuntime:
    """A model whose answers are kept; a runtime as `offramp.answers` has it.

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
            self, encoder, examples, policy, batch_size=self.rows, progress=bar(self.name),
            **LONGEST,
        )  # fmt: skip

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
