"""Quality at every depth of the tiny models, with exits and without; writes
lab/records/analysis.json.

Exits at several depths are trained without labels; test images are judged by the world's exact
ground truth: a caption is right when every attribute of it is, an answer when it is the reference.
"""

import logging
import sys
from typing import Any

from offramp.data.scenes import world
from offramp.data.scenes.tasks import captions_and_questions
from offramp.engine.policy import ExitPolicy
from offramp.models.shipped import TINY
from offramp_lab.experiments.analysis.analyse import analyse
from offramp_lab.experiments.analysis.config import AnalysisConfig
from offramp_lab.records.record import Record, Some, asked
from offramp_lab.records.subjects import right, trained

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


def analysed(kind: str) -> dict[str, Any]:
    examples = captions_and_questions("train", TRAIN)
    adapter, encoder = trained(kind, examples, depths=DEPTHS, steps=STEPS, patience=None)
    policy = ExitPolicy(dict.fromkeys(DEPTHS, THRESHOLD))
    return analyse(
        adapter.with_policy(policy),
        encoder,
        captions_and_questions("test", TEST),
        AnalysisConfig(metric="answers right", batch_size=64),
        quality=right,
        token_class=word_class,
    )


def main() -> None:
    arguments = asked(__doc__, out=RECORD.path, backbone=Some(TINY))
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for kind in arguments.backbone:
        RECORD.add({kind: analysed(kind)}, arguments.out)


if __name__ == "__main__":
    main()
