"""Answers to examples, in batches: by the full model, or by an adapter's policy."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from offramp.adapter import Adapter
from offramp.data.example import Example
from offramp.engine.generate import generate
from offramp.engine.policy import ExitPolicy, GenerationOutput
from offramp.engine.teacher_forcing import Answered
from offramp.models.input_processor import InputProcessor

log = logging.getLogger(__name__)


def self_written(
    encoder: InputProcessor,
    examples: Sequence[Example],
    *,
    batch_size: int,
    max_new_tokens: int,
    min_confidence: float = 0.0,
    progress: Any = iter,
) -> list[Answered]:
    """Greedy answers of the full model, those below `min_confidence` dropped.

    Confidence is the geometric mean of the probabilities the full model gave its own tokens.

    Raises:
        DataError: a prompt leaves no room for `max_new_tokens`.
    """
    written: list[Answered] = []
    confidences: list[float] = []
    for start in progress(range(0, len(examples), batch_size)):
        some = examples[start : start + batch_size]
        prompts = encoder.prompts(some)
        encoder.check_room(prompts, [(e.key, max_new_tokens) for e in some])
        confidence = _Confidence()
        result = generate(
            encoder.backbone,
            prompts,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            logits_processor=[confidence],
        )
        live = result.depths > 0
        for row, example in enumerate(some):
            ids = result.new_tokens[row][live[row]].tolist()
            confidences.append(confidence.of(row, len(ids)))
            if confidences[-1] >= min_confidence:
                written.append(Answered(example, tuple(ids), labelled=False))
    if min_confidence and confidences:
        log.info(
            f"{len(written)} of {len(confidences)} answers reach the confidence {min_confidence}: "
            f"half reach {median(confidences):.4f}, the surest reaches {max(confidences):.4f}"
        )
    return written


class _Confidence:
    """A logits processor that changes nothing and notes the largest log-probability of each row."""

    def __init__(self) -> None:
        self._steps: list[Tensor] = []

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        self._steps.append(scores.float().log_softmax(-1).amax(-1))
        return scores

    def of(self, row: int, tokens: int) -> float:
        return float(torch.stack(self._steps)[:tokens, row].mean().exp())


@dataclass(frozen=True)
class Answer:
    """A free-running answer: its ids and text, and the score at each token's last look."""

    ids: tuple[int, ...]
    text: str
    scores: tuple[float, ...] = ()


def free_running(
    adapter: Adapter,
    encoder: InputProcessor,
    examples: Sequence[Example],
    policy: ExitPolicy,
    batch_size: int,
    options: Mapping[str, Any],
) -> list[Answer]:
    """Each example's answer by `policy`, in batches."""
    found: list[Answer] = []
    for start in range(0, len(examples), batch_size):
        inputs = encoder.prompts(examples[start : start + batch_size])
        result = adapter.generate(inputs, policy=policy, **options)
        rows = zip(
            answer_ids(result),
            encoder.texts(result.new_tokens),
            result.scores.tolist(),
            strict=True,
        )
        found += [Answer(ids, text, tuple(scores[: len(ids)])) for ids, text, scores in rows]
    return found


def answer_ids(result: GenerationOutput) -> list[tuple[int, ...]]:
    """The generated ids of each row, padding removed."""
    rows: Tensor = result.new_tokens
    live = result.depths > 0
    return [tuple(row[keep].tolist()) for row, keep in zip(rows, live, strict=True)]
