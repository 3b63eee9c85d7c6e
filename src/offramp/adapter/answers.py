"""Greedy answers to examples, in batches: by the full model, or by an adapter's policy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from offramp.adapter.adapter import Adapter
from offramp.adapter.runtime import Asked, Runtime
from offramp.common.jsonl_log import JsonlLog
from offramp.core.decoding.policy import FULL, ExitPolicy, GenerationOutput
from offramp.core.engine.generate import generate
from offramp.core.errors import DataError
from offramp.core.models.backbone import Backbone
from offramp.core.storage import digest_rows
from offramp.features.input_processor import InputProcessor
from offramp.features.teacher_forcing import Answered
from offramp.features.vision_cache import digest
from offramp.inputs.example import Example

log = logging.getLogger(__name__)

GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1}


Model = Adapter | Runtime | Backbone
"""What answers: an adapter by its policy or another, or a backbone, which is the full model."""


@dataclass(frozen=True)
class Answer:
    """A generated answer, without padding.

    ids: N tokens, the end token among them. text: decoded, without special tokens.
    depths, scores: of each token: the layers that ran for it, and its confidence at the last exit
    that checked it (NaN: none did).
    confidence: geometric mean of the probabilities that the model gave these tokens; None: not
    asked for.
    offers: as of `GenerationOutput`.
    """

    ids: tuple[int, ...]
    text: str
    depths: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    confidence: float | None = None
    offers: tuple[tuple[float, tuple[int, ...]], ...] = ()


def generate_answers(
    model: Model,
    encoder: InputProcessor,
    examples: Sequence[Example],
    policy: ExitPolicy | None = None,
    *,
    batch_size: int = 32,
    confidence: bool = False,
    progress: Any = iter,
    **options: Any,
) -> list[Answer]:
    """Return the greedy answer to each example.

    Args:
        policy: in place of the adapter's own.
        confidence: whether `Answer.confidence` is computed.
        progress: wraps the numbers at which batches begin.
        options: of generation, such as max_new_tokens.

    Raises:
        DataError: a prompt leaves no room for `max_new_tokens`.
    """
    if isinstance(model, Asked):
        return model.answers(examples, policy, progress=progress, **options)
    batches = prompted(encoder, examples, batch_size, options.get("max_new_tokens"), progress)
    return answers_to(model, encoder, batches, policy, confidence=confidence, **options)


def prompted(
    encoder: InputProcessor,
    examples: Sequence[Example],
    batch_size: int,
    longest: int | None = None,
    progress: Any = iter,
) -> Iterator[Mapping[str, Any]]:
    """Yield the processor's output for the examples, in batches.

    Raises:
        DataError: a prompt leaves no room for `longest` tokens.
    """
    for start in progress(range(0, len(examples), batch_size)):
        chunk = examples[start : start + batch_size]
        inputs = encoder.prompts(chunk)
        if longest:
            encoder.check_room(inputs, [(example.key, longest) for example in chunk])
        yield inputs


def answers_to(
    model: Model,
    encoder: InputProcessor,
    batches: Iterable[Mapping[str, Any]],
    policy: ExitPolicy | None = None,
    *,
    confidence: bool = False,
    **options: Any,
) -> list[Answer]:
    """Return the answers to batches of the processor's output."""
    answers: list[Answer] = []
    for inputs in batches:
        noted = _Confidence()
        more: dict[str, Any] = {"observer": noted} if confidence else {}
        result = generate_by(model, inputs, policy, {**GREEDY, **options, **more})
        rows = answers_of(result, encoder)
        if confidence:
            rows = [
                replace(answer, confidence=noted.of(row, len(answer.ids)))
                for row, answer in enumerate(rows)
            ]
        answers += rows
    return answers


def answers_of(result: GenerationOutput, encoder: InputProcessor) -> list[Answer]:
    """Return the answer in each row of a generation."""
    texts, scores = encoder.texts(result.new_tokens), result.scores.tolist()
    offers = result.offers or [()] * len(texts)
    return [
        Answer(ids, text, depths, tuple(row[: len(ids)]), offers=own)
        for (ids, depths), text, row, own in zip(
            _tokens(result), texts, scores, offers, strict=True
        )
    ]


def _tokens(result: GenerationOutput) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Ids and depths of each row, without the padding after them."""
    for ids, depths in zip(result.new_tokens, result.depths, strict=True):
        live = depths > 0
        yield tuple(ids[live].tolist()), tuple(depths[live].tolist())


def generate_by(
    model: Model, inputs: Mapping[str, Any], policy: ExitPolicy | None, options: Mapping[str, Any]
) -> GenerationOutput:
    """Return the model's generation. policy: in place of the adapter's own."""
    if isinstance(model, Backbone):
        return generate(model, inputs, policy=FULL if policy is None else policy, **options)
    return model.generate(inputs, policy=policy, **options)


class _Confidence:
    """An observer of `generate`: notes the largest log-probability that each token had."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], Tensor] = {}

    def __call__(self, row: int, place: int, logits: Tensor) -> None:
        self._seen[row, place] = logits.float().log_softmax(-1).amax()

    def of(self, row: int, tokens: int) -> float:
        """The geometric mean of the probabilities of a row's first `tokens` tokens."""
        return float(torch.stack([self._seen[row, n] for n in range(tokens)]).mean().exp())


class KeptAnswers:
    """The full model's answers in a file, by their prompts, so that an interrupted or changed run
    does not generate them again.

    file: None: kept in memory alone. asked: all other facts that answers depend on: the backbone
    and its precision.
    """

    def __init__(self, file: Path | None, *asked: Any) -> None:
        self.found: dict[str, Any] = {}
        """By digest of what was asked."""
        self._asked, self._log = asked, None
        if file is None:
            return
        if file.is_file():
            try:
                self.found = {row["key"]: row["answers"] for row in JsonlLog.read(file)}
            except (DataError, KeyError) as error:
                log.warning("%s cannot be read, so its answers are written again: %s", file, error)
                file.unlink()
        self._log = JsonlLog(file, synced=False)

    def of(
        self, inputs: Mapping[str, Any], options: Mapping[str, Any], write: Callable[[], Any]
    ) -> list[Answer]:
        """Return the answers to the processor's output, without depths and scores; `write`
        generates those that are not in the file."""
        key = digest_rows([[digest(dict(inputs)), dict(options), self._asked]])
        if key not in self.found:
            self.found[key] = [[a.ids, a.text, a.confidence] for a in write()]
            if self._log is not None:
                self._log.append({"key": key, "answers": self.found[key]})
        return [Answer(tuple(ids), text, confidence=c) for ids, text, c in self.found[key]]


def full_model_answers(
    encoder: InputProcessor,
    examples: Sequence[Example],
    *,
    batch_size: int,
    max_new_tokens: int,
    min_confidence: float = 0.0,
    progress: Any = iter,
    kept: KeptAnswers | None = None,
) -> list[Answered]:
    """Return the full model's answers as rows for teacher forcing, without those whose confidence
    is below `min_confidence`.

    kept: a store of answers, which is read and extended.

    Raises:
        DataError: a prompt leaves no room for `max_new_tokens`.
    """
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "confidence": min_confidence > 0}
    answers: list[Answer] = []
    for inputs in prompted(encoder, examples, batch_size, max_new_tokens, progress):
        write = partial(answers_to, encoder.backbone, encoder, [inputs], **options)
        answers += write() if kept is None else kept.of(inputs, options, write)
    sure = [answer.confidence for answer in answers if answer.confidence is not None]
    rows = [
        Answered(example, answer.ids, labelled=False)
        for example, answer in zip(examples, answers, strict=True)
        if answer.confidence is None or answer.confidence >= min_confidence
    ]
    if sure:
        log.info(
            f"{len(rows)} of {len(sure)} answers reach the confidence {min_confidence}: "
            f"half reach {median(sure):.4f}, the highest is {max(sure):.4f}"
        )
    return rows
