"""What is asked of a calibration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from offramp.calibration.attempts import UNITS, Draws, error_share
from offramp.calibration.risk_control import METHODS, images_for, samples_needed, upper_bound
from offramp.calibration.risk_functions import RISKS
from offramp.core.errors import InputError, check_known
from offramp.inputs.example import Example
from offramp.promises.prompt_kinds import kind_of, prompt_frames


@dataclass(frozen=True)
class Guarantee:
    """The guarantee that a user asks for, P(risk <= target) >= confidence, and how it is tested.

    risk: a name of `RISKS`; method: of `METHODS`. unit: over what the risk is a mean. "image":
    images, each by the mean loss of its answers; "answer": answers, so that an image with many
    counts more. each_kind: True: each kind of prompt is tested; False: all together. kind_targets:
    targets by how prompts of a kind begin; with any, each kind is tested. candidates: number of
    adapters, training seeds or image sets of which the best is taken; they share the error budget.

    Raises:
        InputError: a value is outside its range, or a name is unknown.
    """

    target: float = 0.01
    confidence: float = 0.95
    risk: str = "disagreement"
    method: str = "auto"
    unit: str = "image"
    candidates: int = 1
    each_kind: bool = False
    kind_targets: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (0 < self.target < 1 and 0 < self.confidence < 1):
            raise InputError(
                f"Target {self.target} and confidence {self.confidence} must lie between 0 and 1.",
                "For example target 0.01 (1% of answers may differ) and confidence 0.95.",
            )
        for kind, target in self.kind_targets.items():
            if not (kind.strip() and 0 < target < 1):
                raise InputError(
                    f"A target of {target} for prompts that begin with {kind!r} says nothing.",
                    "Name the kind by how its prompts begin, and give a number between 0 and 1.",
                )
        check_known("Risk", [self.risk], tuple(RISKS))
        check_known("Method", [self.method], METHODS)
        check_known("Unit", [self.unit], UNITS)
        if self.candidates < 1:
            raise InputError(
                f"A choice of {self.candidates} says nothing.", "Give a whole number from 1."
            )

    @property
    def by_kind(self) -> bool:
        """Return True if each kind of prompt is tested."""
        return self.each_kind or bool(self.kind_targets)

    def target_of(self, kind: str) -> float:
        """Return the target for the kind of prompt with this name."""
        own = (t for begin, t in self.kind_targets.items() if kind.startswith(begin))
        return next(own, self.target)

    def level(self, attempt: int, handed: float = 0.0) -> float:
        """Return the confidence of the test of attempt number `attempt`, from 1. handed: share of
        the error budget that earlier attempts hand on."""
        share = error_share(attempt) + handed
        return 1 - (1 - self.confidence) * share / self.candidates

    def images_needed(self) -> int | None:
        """Return the fewest images with which a first attempt can keep the target, if no answer
        loses anything; None: no number."""
        return samples_needed(self.target, self.level(1), self.method)

    def images_for(self, risk: float) -> int | None:
        """Return the number of images with which four of five first attempts pass, if the true risk
        is `risk`; None: no number."""
        return images_for(self.target, self.level(1), risk)

    def least_target(self, examples: Sequence[Example]) -> float:
        """Return the smallest target that a first attempt on these examples can guarantee, if no
        answer loses anything; in units of `target` for kinds with targets of their own.

        For n images, with one answer each that loses 0 or 1: 1 - ((1 - level) * 0.85) ** (1 / n).
        """
        frames = prompt_frames([e.prompt for e in examples]) if self.by_kind else []
        kinds: dict[str, list[Example]] = {}
        for example in examples:
            kinds.setdefault(kind_of(example.prompt, frames), []).append(example)
        nothing = [self._nothing(kind, some) for kind, some in kinds.items()]
        return upper_bound(nothing, self.level(1), self.method)

    def _nothing(self, kind: str, examples: Sequence[Example]) -> Draws:
        """Draws of answers to a kind of prompt that lose nothing."""
        drawn = Counter(example.source or example.group or example.key for example in examples)
        sizes = [1 if self.unit == "image" else answers for answers in drawn.values()]
        risk = RISKS[self.risk]
        whole = risk.whole and max(drawn.values()) == 1
        none = Draws.of(np.zeros(len(drawn)), whole=whole)
        times = self.target_of(kind) / self.target / risk.most(examples)
        return replace(none, counts=np.array(sizes, float), largest=float(max(sizes)), times=times)
