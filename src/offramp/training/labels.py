"""What the exits are to say: answers from the data, or written by the frozen model itself."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from offramp.config import TrainConfig
from offramp.decode import generate
from offramp.encode import Encoder
from offramp.errors import DataError
from offramp.examples import Example

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answered:
    """An example with the answer ids it is trained on, and whether a person wrote them."""

    example: Example
    ids: tuple[int, ...]
    labelled: bool


def answers_of(
    encoder: Encoder,
    examples: Sequence[Example],
    config: TrainConfig,
    *,
    share: slice,
    progress: Any = iter,
) -> list[Answered]:
    """The answers of a regime for `share` of the examples; `progress` wraps what is iterated.

    Of a labelled example it is those that were given most often: all its captions.

    The regime picks its labelled examples before they are shared out, so that they are the same
    ones on any number of processes. Pseudo-labelling may leave none.

    Raises:
        DataError: an example without an answer where the regime needs one.
    """
    labelled = labelled_examples(examples, config)
    if missing := next((e for e in labelled if not e.answers), None):
        raise DataError(
            f"Example {missing.key!r} has no answer, and the {config.regime} regime needs one.",
            "Add answers, or use --regime unsupervised.",
        )
    chosen = {id(example) for example in labelled}
    rest = [example for example in examples if id(example) not in chosen]
    taught = [(e, answer) for e in labelled for answer in most_given(e.answers)]
    rows = [
        Answered(e, tuple(encoder.answer_ids(e.prompt, answer)), labelled=True)
        for e, answer in taught[share]
    ]
    pseudo = config.regime == "pseudo"
    written = self_written(
        encoder,
        rest[share],
        batch_size=max(config.batch_size, 16),
        max_new_tokens=config.max_new_tokens,
        min_confidence=config.min_confidence if pseudo else 0.0,
        progress=progress,
    )
    return rows + [Answered(row.example, row.ids, labelled=pseudo) for row in written]


def most_given(answers: Sequence[str]) -> list[str]:
    """Those that were given most often: of captions, which all differ, each; of annotators' answers
    to a question, what most of them say."""
    counts = Counter(answers)
    return [answer for answer, count in counts.items() if count == max(counts.values())]


def labelled_examples(examples: Sequence[Example], config: TrainConfig) -> list[Example]:
    if config.regime == "supervised":
        return list(examples)
    if config.regime != "mixed":
        return []
    share = config.labelled_fraction  # spread evenly, the first one always
    return [e for i, e in enumerate(examples) if math.ceil((i + 1) * share) > math.ceil(i * share)]


def self_written(
    encoder: Encoder,
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
