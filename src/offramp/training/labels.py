"""What the exits are to say: answers from the data, or written by the frozen model itself."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from offramp.adapter.answers import KeptAnswers, full_model_answers
from offramp.core.errors import DataError
from offramp.features.input_processor import InputProcessor
from offramp.features.teacher_forcing import Answered
from offramp.inputs.example import Example
from offramp.training.config import TrainConfig

log = logging.getLogger(__name__)


def answers_of(
    encoder: InputProcessor,
    examples: Sequence[Example],
    config: TrainConfig,
    *,
    share: slice,
    progress: Any = iter,
    kept: KeptAnswers | None = None,
) -> list[Answered]:
    """Return the answers for training, by the regime, for `share` of the examples. progress: wraps
    the iteration. kept: as of `full_model_answers`.

    A labelled example gives its most frequent answers: all its captions.

    The regime picks its labelled examples before they are shared out, so that they are the same on
    any number of processes. Pseudo-labelling may leave no answer.

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
    unlabelled = [example for example in examples if id(example) not in chosen]
    taught = [(e, answer) for e in labelled for answer in most_given(e.answers)]
    rows = [
        Answered(e, tuple(encoder.answer_ids(e.prompt, answer)), labelled=True)
        for e, answer in taught[share]
    ]
    pseudo = config.regime == "pseudo"
    written = full_model_answers(
        encoder,
        unlabelled[share],
        batch_size=max(config.batch_size, 16),
        max_new_tokens=config.max_new_tokens,
        min_confidence=config.min_confidence if pseudo else 0.0,
        progress=progress,
        kept=kept,
    )
    return rows + [Answered(row.example, row.ids, labelled=pseudo) for row in written]


def most_given(answers: Sequence[str]) -> list[str]:
    """Return the most frequent answers: all captions, which differ, or the majority's answer to a
    question."""
    counts = Counter(answers)
    return [answer for answer, count in counts.items() if count == max(counts.values())]


def labelled_examples(examples: Sequence[Example], config: TrainConfig) -> list[Example]:
    if config.regime == "supervised":
        return list(examples)
    if config.regime != "mixed":
        return []
    share = config.labelled_fraction  # spread evenly, the first one always
    return [e for i, e in enumerate(examples) if math.ceil((i + 1) * share) > math.ceil(i * share)]
