"""What a training run learns from: the frozen model's states at the answers, recorded once.

Each process records its own share, as many answers as every other; processes that compute each
layer together (tensor parallel) record the same one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator

from offramp.adapter.answers import KeptAnswers
from offramp.common.progress import progress
from offramp.core.errors import DataError
from offramp.core.models.fingerprint import dump_fingerprint, fingerprint
from offramp.features.input_processor import InputProcessor
from offramp.features.teacher_forcing import Answered
from offramp.inputs.example import Example, split_examples
from offramp.training.config import TrainConfig
from offramp.training.feature_store import FeatureStore
from offramp.training.labels import answers_of, labelled_examples
from offramp.training.sharding import Share, in_step

log = logging.getLogger(__name__)

FOLDER, ANSWERS = "training/features", "training/answers"
Stores = tuple[FeatureStore, FeatureStore]  # of the answers to train and to validate on


class Teacher(Protocol):
    """The model that exits learn from in the backbone's place, while this context is open: the same
    backbone with weights in a number format. name: of the format."""

    @property
    def name(self) -> str: ...

    def __enter__(self) -> Any: ...

    def __exit__(self, *_: Any) -> None: ...


@dataclass(frozen=True)
class TrainingStates:
    """The training states of examples, by a configuration, for exits at `depths`. out: the run's
    folder. teacher: open while answers are written and states are recorded.

    Raises:
        DataError: no examples.
    """

    encoder: InputProcessor
    examples: Sequence[Example]
    config: TrainConfig
    depths: tuple[int, ...]
    accelerator: Accelerator
    out: Path
    teacher: AbstractContextManager[Any]

    def __post_init__(self) -> None:
        if not self.examples:
            raise DataError(
                "There are no examples to train on.", "Check the data's path and split."
            )

    @cached_property
    def share(self) -> Share:
        """Return the share of the answers that this process records."""
        whole = self.accelerator.num_processes, self.accelerator.process_index
        return Share.of(self.encoder.backbone.model, *whole)

    @property
    def key(self) -> tuple[Any, ...]:
        """Return a key of all that the states depend on, besides the examples and the backbone."""
        config = self.config
        answers = {
            "mixed": (config.labelled_fraction, config.learns_without_labels),
            "pseudo": (config.min_confidence,),
        }
        split = (
            config.seed,
            config.validation_fraction,
            config.batch_size,
            config.max_new_tokens,
            config.cache,
        )
        return (self.depths, config.regime, answers.get(config.regime), *split)

    def record(self) -> Stores:
        """Split the examples by image, answer them as the regime says, and record the states.

        Raises:
            DataError: too few examples or answers, no labels where the regime needs them, a
                damaged image, or an answer longer than the backbone's positions.
        """
        self._check_pictures()
        held_out = self.config.validation_fraction
        parts = split_examples(
            self.examples, {"train": 1 - held_out, "validation": held_out}, self.config.seed
        )
        teaching, config = parts["train"], self.config
        if config.regime == "mixed" and not config.learns_without_labels:  # the rest is no use
            teaching = labelled_examples(teaching, config)
            config = replace(config, regime="supervised")
        return (
            self._store("train", teaching, config),
            self._store("validation", parts["validation"], self.config),
        )

    def _check_pictures(self) -> None:
        """Open each image once: a damaged one should stop the run now, not hours into it."""
        seen = [example for example in self.examples if not example.is_text]
        distinct = {e.image if isinstance(e.image, Path) else id(e.image): e for e in seen}
        for example in progress_bar(self.accelerator, "checking images")(distinct.values()):
            example.open_image()

    def _store(self, name: str, examples: Sequence[Example], config: TrainConfig) -> FeatureStore:
        rows = self._rows(examples, config)
        store = FeatureStore(
            self.encoder,
            rows,
            self.depths,
            batch_size=self.config.batch_size,
            cache=self.config.cache,
            teacher=self.teacher,
            folder=self.out / FOLDER / f"{name}-{self.share.index}",
            share=self.share,
        )
        if self.accelerator.is_main_process:
            size = f"{store.nbytes / 1e6:.0f} MB ({store.kind})"
            log.info(f"{name}: {len(rows)} answers in {len(store)} batches, states of about {size}")
        store.fill(progress_bar(self.accelerator, f"{name} states"))
        return store

    def _rows(self, examples: Sequence[Example], config: TrainConfig) -> list[Answered]:
        """The rows of this process: all processes get as many, or collectives would deadlock."""
        share, backbone = self.share, self.encoder.backbone
        if len(examples) < share.count:
            raise DataError(
                f"{len(examples)} examples are fewer than the {share.count} processes.",
                "Give more examples, or fewer processes.",
            )
        with self.teacher:
            ran = dump_fingerprint(fingerprint(backbone))
            asked = ran, str(backbone.dtype)
            file = self.out / f"{ANSWERS}-{share.index}.jsonl"
            kept = KeptAnswers(file if share.leads else None, *asked)
            kept.found = share.of_group(kept.found)[0]  # or one would write what another has
            with in_step(backbone.layers):
                rows = answers_of(
                    self.encoder,
                    examples,
                    config,
                    share=slice(share.index, None, share.count),
                    progress=progress_bar(self.accelerator, "writing answers"),
                    kept=kept,
                )
        count = torch.tensor([len(rows)], device=self.encoder.backbone.device)
        fewest = int(self.accelerator.gather(count).min())
        if not fewest:
            raise DataError(
                f"No answer reached the confidence {config.min_confidence}.",
                "Lower min_confidence, or train by the regime unsupervised.",
            )
        return rows[:fewest]


def progress_bar(accelerator: Accelerator, title: str) -> Any:
    """Return a function that wraps an iterable in a progress bar, on the main process only."""
    quiet = not accelerator.is_main_process
    return lambda iterable: progress(iterable, title, tell=not quiet)
