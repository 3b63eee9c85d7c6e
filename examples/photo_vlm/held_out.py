"""The photographs that exits are trained and measured on, and what the full model says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from examples.photo_vlm.evaluate import LONGEST, METRICS, accuracy, caption_measures
from examples.photo_vlm.rows import half_of, read_photographs
from offramp.adapter.adapter import Adapter
from offramp.adapter.answers import Answer, generate_answers
from offramp.core.models.exits import Exits, ExitSet
from offramp.features.vision_cache import VisionCache
from offramp.inputs.example import Example
from offramp.training.feature_dataset import Stores

SHORTLIST = 2048
DROPS = (0.01, 0.03)
"""Relative drops of CIDEr within which the fastest thresholds are looked for."""
CONFIDENCE = 0.95
THRESHOLDS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Captions of a small model: few tokens are said with more than nine tenths of the probability."""
DRAFTS = (0.0, 0.1, 0.2, 0.3, 0.5)

_ALONE = {"adversarial": 0.0}
_LABELS_ONLY = {"distillation": 0.0, "adversarial": 0.0}
REGIMES: dict[str, dict[str, Any]] = {
    "unsupervised": {},
    "unsupervised, distillation alone": _ALONE,
    "100% labels": {"regime": "supervised"},
    "10% labels": {"regime": "mixed", "labelled_fraction": 0.1},
    "1% labels": {"regime": "mixed", "labelled_fraction": 0.01},
    "pseudo-labels": {"regime": "pseudo", "min_confidence": 0.35},  # about the surer half
    "100% labels, cross-entropy alone": {"regime": "supervised", **_LABELS_ONLY},
}
"""Changes to the `TrainConfig`."""


@dataclass(frozen=True)
class Sizes:
    """Photographs with captions and questions to train exits on, steps, examples measured (`exact`:
    captions decoded losslessly), whether lossless mode is measured in bfloat16 too (`curves`), and
    the risks that are guaranteed."""

    captions: int = 6000
    questions: int = 1000
    steps: int = 8000
    held_out: int = 1000
    asked: int = 600
    timed: int = 60
    rounds: int = 2
    exact: int = 300
    curves: bool = True
    targets: tuple[float, ...] = (0.01, 0.05)


SMALL = Sizes(
    captions=800, questions=100, steps=1500, held_out=600, asked=200, timed=50, rounds=1, targets=()
)
"""To hold regimes against each other, in half an hour each."""
MODEST = Sizes(
    captions=400,
    questions=40,
    steps=400,
    held_out=240,
    asked=60,
    timed=8,
    rounds=2,
    exact=24,
    curves=False,
    targets=(0.05,),
)
"""One regime and its lossless mode, in ten minutes of one core."""
MIDDLE = Sizes(
    captions=1500,
    questions=200,
    steps=1200,
    held_out=800,
    asked=200,
    timed=50,
    rounds=3,
    exact=40,
    curves=False,
)
"""One regime and its lossless mode, speeds on 50 photographs; an hour of one core."""
LARGE = Sizes()
"""One regime with all that is asked of the first one, speeds on 60 photographs; two hours of one
core."""
QUICK = Sizes(24, 8, 4, 16, 40, 2, 1)
SIZES = {"large": LARGE, "middle": MIDDLE, "small": SMALL, "modest": MODEST, "quick": QUICK}


class Photos:
    """The photo model, the photographs, and the full model's answers to them."""

    def __init__(
        self, built: tuple[Any, Any], data: Path, sizes: Sizes, depths: Sequence[int]
    ) -> None:
        """built: backbone and encoder."""
        self.backbone, self.encoder = built
        self.sizes, self.depths = sizes, tuple(depths)
        splits = read_photographs(data)
        self.train = splits["captions"][: sizes.captions] + splits["questions"][: sizes.questions]
        self.held = {
            "captions": splits["captions_val"][: sizes.held_out],
            "questions": splits["questions_val"][: sizes.asked],
        }
        self.cache = VisionCache(1 << 28)
        self.stores: dict[Any, Stores] = {}

    @property
    def timed(self) -> list[dict[str, Any]]:
        """Prompts to be timed on: captions of the measuring half."""
        return self._prompts(1, self.sizes.timed)

    @property
    def drafted(self) -> list[dict[str, Any]]:
        """Prompts that drafts are tried on: captions of the choosing half."""
        return self._prompts(0, 6)

    def _prompts(self, half: int, count: int) -> list[dict[str, Any]]:
        return [self.encoder.prompts([e]) for e in self.part("captions", half)[:count]]

    def part(self, name: str, half: int) -> list[Example]:
        return [e for e in self.held[name] if half_of(e) == half]

    def answers(self, adapter: Adapter, name: str, examples: Sequence[Example]) -> list[Answer]:
        """Free-running greedy answers by the adapter's policy."""
        return generate_answers(
            adapter,
            self.encoder,
            examples,
            batch_size=64,
            max_new_tokens=LONGEST[name],
            vision_cache=self.cache,
        )

    @cached_property
    def none(self) -> Adapter:
        """The full model."""
        return Adapter(self.backbone, ExitSet(Exits(self.backbone, self.depths[:1], kind="lens")))

    @cached_property
    def full(self) -> dict[tuple[str, int], list[Answer]]:
        """The full model's answers by task and half."""
        return {
            (name, half): self.answers(self.none, name, self.part(name, half))
            for name in LONGEST
            for half in (0, 1)
        }


def cider(answers: Sequence[Answer], examples: Sequence[Example]) -> float:
    texts = [answer.text for answer in answers]
    return caption_measures(texts, examples, ("CIDEr",))["CIDEr"].value


# -- the full model ---------------------------------------------------------------------------


def full_figures(photos: Photos) -> dict[str, Any]:
    """The full model on all held-out photographs."""
    captions, questions = (
        (
            [answer.text for half in (0, 1) for answer in photos.full[name, half]],
            [example for half in (0, 1) for example in photos.part(name, half)],
        )
        for name in LONGEST
    )
    measures = caption_measures(*captions, METRICS)
    return {
        **{name.lower(): measure.value for name, measure in measures.items()},
        "daquar_accuracy": accuracy(*questions),
        "captions": len(captions[0]),
        "questions": len(questions[0]),
    }
