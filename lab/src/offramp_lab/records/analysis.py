"""Quality at every depth of the tiny models, with exits and without; writes
lab/records/analysis.json.

Exits at several depths are trained without labels; test images are judged by the world's exact
ground truth: a caption is right when every attribute of it is, an answer when it is the reference.
"""

import logging
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from offramp.answers import Answer
from offramp.calibration.risk_functions import Array, Quality
from offramp.data.example import Example
from offramp.data.scenes import world
from offramp.data.scenes.tasks import Task, captions, captions_and_questions, questions
from offramp.engine.policy import ExitPolicy
from offramp.models.input_processor import InputProcessor
from offramp.models.shipped import TINY, load_tiny
from offramp.training.config import FREE, TrainConfig
from offramp.training.trainer import train
from offramp_lab.experiments.analysis.analyse import analyse
from offramp_lab.experiments.analysis.config import AnalysisConfig
from offramp_lab.records.record import Record, Some, asked

RECORD = Record("analysis")
DEPTHS, STEPS, THRESHOLD = (2, 4, 6, 8), 400, 0.9
TRAIN, TEST = 400, 200  # images; each gives a caption and two questions

CLASSES = {
    "colour": (*world.COLORS, *world.BACKGROUNDS),
    "shape": world.SHAPES,
    "size": world.SIZES,
    "place": (*world.ROWS, *world.COLUMNS),
    "count": world.COUNTS,
    "yes or no": ("yes", "no"),
}


def word_class(text: str, _: int) -> str:
    """The class of a token of the world's language; what is no attribute is grammar."""
    word = text.strip()
    return next((name for name, words in CLASSES.items() if word in words), "grammar")


def judge(tasks: Sequence[Task]) -> Quality:
    """1 for answers that their task calls right, else 0."""
    task_of = {example.key: task for task in tasks for example in task.examples}

    def right(answers: Sequence[Answer], examples: Sequence[Example]) -> Array:
        pairs = zip(answers, examples, strict=True)
        return np.array([float(task_of[e.key].correct(a.text, e)) for a, e in pairs])

    return right


def analysed(kind: str, folder: str) -> dict[str, Any]:
    backbone, processor = load_tiny(kind)
    config = TrainConfig(depths=DEPTHS, steps=STEPS, batch_size=32, patience=None, **FREE)
    examples = captions_and_questions("train", TRAIN)
    adapter = train(backbone, processor, examples, config, folder)
    policy = ExitPolicy(dict.fromkeys(DEPTHS, THRESHOLD))
    tasks = [captions("test", TEST), questions("test", TEST)]
    return analyse(
        adapter.with_policy(policy),
        InputProcessor(backbone, processor),
        [example for task in tasks for example in task.examples],
        AnalysisConfig(metric="answers right", batch_size=64),
        quality=judge(tasks),
        token_class=word_class,
    )


def main() -> None:
    arguments = asked(__doc__, out=RECORD.path, backbone=Some(TINY))
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    analyses = RECORD.read(arguments.out)
    for kind in arguments.backbone:
        with tempfile.TemporaryDirectory() as folder:
            analyses[kind] = analysed(kind, folder)
        RECORD.write(analyses, arguments.out)


if __name__ == "__main__":
    main()
