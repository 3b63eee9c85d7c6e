"""What is guaranteed of an adapter's answers, and whether it is where they are given.

A guarantee is about answers as they were calibrated. What may change them is noted beside it
(`offramp.promises.conditions`), and compared where the adapter is loaded and at every request
(`standing`).
What differs is named, and nothing is guaranteed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from offramp.promises.conditions import Conditions, differences, shown
from offramp.promises.likeness import LIKE
from offramp.promises.prompt_kinds import point_of

NEEDED = ("risk", "target", "confidence", "n", "attempt", "unit", "conditions")
"""What a calibration must say for its guarantee to count."""
WATCHED = ("disagreement", "consistency")
"""Risks that requests show without right answers."""
SCALES = {"cider_drop": 2.5}
"""Points of a score that a loss of 1 stands for, by risk; of others 1."""
NOTHING = 0.5
"""A promise that lets so large a share of what there is to lose be lost says nothing."""


@dataclass(frozen=True)
class Promise:
    """P(risk <= target) >= confidence, over images like the n of the calibration.

    unit: "image": an image's risk is the mean loss of its answers; "group": a group's risk is the
    mean of its images; "answer": all answers count alike. largest: the most answers about one
    calibrated image. kinds: of prompts with a promise each; (): one promise for all. qualities: for
    risks with labels, the mean quality of the full model's answers by kind of prompt, which is the
    most that can be lost; empty: unknown.
    """

    risk: str
    target: float
    confidence: float
    unit: str = "image"
    n: int = 0
    largest: int = 1
    kinds: Sequence[str] = ()
    own_targets: Mapping[str, float] = field(default_factory=dict)
    qualities: Mapping[str, float] = field(default_factory=dict)

    def of_kind(self, kind: str) -> Promise:
        """Return the promise for prompts of one kind, if each kind has one."""
        if not self.kinds:
            return self
        return replace(self, target=self.target_of(kind), kinds=(kind,), own_targets={})

    @property
    def amount(self) -> str:
        """Return in three words how much may be lost."""
        times = SCALES.get(self.risk, 1)
        if self.risk == "disagreement":
            return f"{100 * self.target:.3g}% differ"
        what = _SHORT.get(self.risk, self.risk.removesuffix("_drop").replace("_", " "))
        return f"{times * self.target:.3g} {what}"

    @property
    def told(self) -> list[str]:
        """Return a sentence for each kind of prompt, or one for all."""
        some = [(kind, self.of_kind(kind)) for kind in self.kinds] or [("", self)]
        said = [(k, p.empty or f"at most {p.amount}") for k, p in some]
        return [f"{kind!r}: {words}" if kind else words for kind, words in said]

    @property
    def empty(self) -> str:
        """Return why the promise is empty; "" where it is not."""
        known = [q for kind, q in self.qualities.items() if not self.kinds or kind in self.kinds]
        most = max(known, default=1.0)  # all that can be lost
        if self.target < NOTHING * most:
            return ""
        times = SCALES.get(self.risk, 1)
        return (
            f"what was calibrated lets {times * self.target:.3g} of {times * most:.3g} be lost, "
            "which says nothing"
        )

    def target_of(self, kind: str) -> float:
        """Return the target for a kind of prompt."""
        return self.own_targets.get(kind, self.target)

    @property
    def least(self) -> float:
        """Return the smallest target of any kind."""
        return min([self.target, *self.own_targets.values()])

    @property
    def claim(self) -> str:
        """Return the end of a sentence with the promise, its unit and its population."""
        each = f"for each kind of prompt ({kinds_words(self.kinds)}) " if self.kinds else ""
        words = risk_words(self.risk, self.unit)
        most = target_words(self.risk, self.target, self.own_targets)
        return f"{each}{words} is at most {most} {LIKE}"


_SHORT = {
    "consistency": "ROUGE-L apart",
    "cider_drop": "CIDEr-D lost",
    "rouge_l_drop": "ROUGE-L lost",
    "exact_match_drop": "exact match lost",
    "vqa_accuracy_drop": "VQA accuracy lost",
}


def watched(calibration: Mapping[str, Any] | None, promise: Promise) -> Promise | None:
    """Return the part of a promise that requests can test; None: no part.

    That is the whole promise or, where it needs right answers, which requests do not bring, a bound
    by kind of prompt on how much early answers differ from the full model's.
    """
    if promise.risk in WATCHED:
        return promise
    said = (calibration or {}).get("watched") or {}
    targets = {str(kind): share for kind, share in (said.get("targets") or {}).items()}
    if said.get("risk") not in WATCHED or not all(map(_is_share, targets.values())) or not targets:
        return None
    least = min(targets.values())
    return replace(promise, risk=said["risk"], target=least, kinds=(), own_targets=targets)


def kinds_words(kinds: Sequence[str]) -> str:
    """Return the names of kinds of prompts, for people."""
    return " and ".join(repr(kind) if kind else "any other" for kind in kinds)


def target_words(risk: str, target: float, own: Mapping[str, float]) -> str:
    """Return a target for people, in units of the score, with kinds of prompts that have their
    own."""
    times = SCALES.get(risk, 1)
    more = (f" ({times * share:g} of {kind!r})" for kind, share in own.items())
    return f"{times * target:g}{''.join(more)}"


def risk_words(risk: str, unit: str) -> str:
    """Return a risk with its unit, as the start of a sentence."""
    what = {
        "disagreement": "share of answers that differ from the full model's",
        "consistency": "1 - ROUGE-L against the full model's answer",
        "exact_match_drop": "drop of exact match with people's answers",
        "rouge_l_drop": "drop of ROUGE-L against people's answers",
        "cider_drop": "drop of CIDEr-D (capped at 2.5, for captions 1.25) against people's answers",
        "vqa_accuracy_drop": "drop of VQA accuracy",
    }.get(risk, risk.replace("_", " "))
    if unit in ("image", "group"):
        of = "groups of images" if unit == "group" else "images"
        return f"the mean over {of} of the {what}"
    return f"the {what}" if risk == "disagreement" else f"the mean over answers of the {what}"


@dataclass(frozen=True)
class GuaranteeStatus:
    """The status of a guarantee. promise: what is guaranteed here; None: nothing. why: objections
    to an existing calibration; empty without a calibration, or where it guarantees nothing."""

    promise: Promise | None = None
    why: str = ""

    @property
    def sentence(self) -> str:
        """Return the guarantee as a sentence; empty without a promise and without objections."""
        if self.promise is not None:
            return f"guaranteed with {self.promise.confidence:.0%} confidence: {self.promise.claim}"
        return f"not guaranteed here: {self.why}" if self.why else ""


def standing(
    calibration: Mapping[str, Any] | None, here: Conditions, kind: str = ""
) -> GuaranteeStatus:
    """Return what a calibration guarantees under these conditions. kind: of the prompt, which may
    have thresholds of its own."""
    if not calibration or calibration.get("measured") is None:
        return GuaranteeStatus()
    missing = [name for name in NEEDED if calibration.get(name) is None]
    if missing:
        said = ", ".join(missing)
        why = f"the calibration does not say {said}, so it needs to be made again"
        return GuaranteeStatus(why=why)
    target, confidence = calibration["target"], calibration["confidence"]
    if not (_is_share(target) and _is_share(confidence)):
        why = f"a target of {target} at a confidence of {confidence} says nothing"
        return GuaranteeStatus(why=why)
    bound = calibration.get("bound")
    if not isinstance(bound, int | float) or not bound <= target + 1e-6:
        return GuaranteeStatus(why=f"the risk was bounded by {bound}, and {target} was to be shown")
    then = Conditions.of_calibration(calibration)
    found = differences(then, here, risk=calibration["risk"])
    if point := found and point_of(calibration, kind):  # all kinds passed the common one too
        found = differences(then.at(point), here, risk=calibration["risk"])
    if found:
        return GuaranteeStatus(why="; ".join(found))
    names = ("risk", "target", "confidence", "unit", "n")
    kinds = calibration.get("kinds") if calibration.get("each_kind") else None
    return GuaranteeStatus(
        Promise(
            **{name: calibration[name] for name in names},
            largest=calibration.get("largest") or 1,
            kinds=tuple(str(kind.get("kind")) for kind in kinds or () if isinstance(kind, Mapping)),
            own_targets={
                str(kind.get("kind")): kind["target"]
                for kind in kinds or ()
                if isinstance(kind, Mapping) and kind.get("target") is not None
            },
            qualities={
                str(kind): float(quality)
                for kind, quality in (calibration.get("qualities") or {}).items()
            },
        )
    )


def shown_conditions(calibration: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Return a calibration's conditions in words, by name."""
    then = Conditions.of_calibration(calibration)
    known = ((name, value) for name, value in then.items() if value is not None)
    return [(name.replace("_", " "), shown(name, value)) for name, value in known]


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < 1
