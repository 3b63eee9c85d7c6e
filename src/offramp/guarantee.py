"""What is guaranteed of an adapter's answers, and whether it is where they are given.

A guarantee is about answers as they were calibrated. What may change them is noted beside it
(`Conditions`), and compared where the adapter is loaded and at every request (`standing`). What
differs is named, and nothing is guaranteed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from offramp.engine.policy import ExitPolicy, Thresholds, resolved
from offramp.models.backbone import Backbone
from offramp.models.quantized.prepacked import PrepackedLinear
from offramp.models.quantized.weights import scheme
from offramp.models.shrink_on_load import smallest_side
from offramp.models.vision_engine import IN_BF16

TORCH = "torch"
"""The engine of an adapter that answers by itself, one by one or in slots."""
FRAMES = 8
"""Kinds of prompts that are told apart by their first word; of more, all are one kind. No more are
shown."""
NEEDED = ("risk", "target", "confidence", "n", "attempt", "unit", "conditions")
"""What a calibration must say for its guarantee to count."""
_VISUAL: Mapping[str, Any] = {"visual_keep": 1.0, "visual_ranking": "attention"}
"""As it was before there was a choice."""
SAME_IN_FLOAT32 = ("kernels", "vision")
"""What changes no answer of PyTorch in float32; docs/guarantees.md lists it, and tests try it."""


# -- prompts ---------------------------------------------------------------------------------------


def prompt_frames(prompts: Sequence[str]) -> list[list[str]]:
    """What prompts have in common: [prompt] of one that stays the same, [before, behind] of a
    template, for each first word or, where these are many, for all. Prompts that share no word are
    kept themselves."""
    kinds: dict[str, set[str]] = {}
    for prompt in prompts:
        kinds.setdefault(re.split(r"[\s:]", prompt, maxsplit=1)[0], set()).add(prompt)
    if len(kinds) > FRAMES:
        kinds = {"": set(prompts)}
    return [frame for word in sorted(kinds) for frame in _frames(sorted(kinds[word]))]


def _frames(prompts: Sequence[str]) -> list[list[str]]:
    first, last = prompts[0], prompts[-1]  # sorted: these two share the least from the start
    before = _common(first, last)
    backwards = sorted(prompt[::-1] for prompt in prompts)
    behind = _common(backwards[0], backwards[-1])[::-1]
    # Whole words alone: questions that happen to begin with one letter have no template.
    before = before[: max((m.end() for m in re.finditer(r"\W", before)), default=0)]
    starts = [m.start() for m in re.finditer(r"\W", behind)]
    behind = behind[starts[0] :] if starts else ""
    if len(prompts) == 1 or not _has_word(before + behind):
        return [[prompt] for prompt in prompts]
    return [[before, behind]]


def _has_word(text: str) -> bool:
    """Else any text would fit what is left of a template."""
    return re.search(r"\w", text) is not None


def _common(one: str, other: str) -> str:
    n = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    return one[: min(len(one), len(other)) if n is None else n]


def fits(prompt: str, frames: Sequence[Sequence[str]]) -> bool:
    """Whether a prompt is like those that `prompt_frames` saw."""
    for before, *behind in frames:
        if not behind and prompt == before:
            return True
        # Calibrations of earlier versions hold templates without a word.
        template = behind and _has_word(before + behind[0])
        if template and prompt.startswith(before) and prompt.endswith(behind[0]):
            return True
    return False


# -- conditions ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conditions:
    """What may change an answer; None: not known, and not compared.

    dtype: of the backbone. quantized: how its layers are held; "" as `dtype`. engine: "torch", or
    a runtime's name with its number format. kernels: "plain", "prepacked", "exact-batch" or
    "compiled". vision: what runs the vision tower, in runtimes too; None, of before there was a
    choice: "torch".
    shrink_on_load: whether JPEGs are decoded no larger than needed; before there was a choice, not.
    device: its kind. sampling: "greedy", or how else tokens are chosen. longest: tokens of the
    longest answer. prompts: see `prompt_frames`; of a request, its one prompt. template: digest of
    the chat template, "" where there is none. The rest is of the policy; thresholds, those of first
    tokens, gates and weights by depth, as JSON.
    """

    dtype: str | None = None
    quantized: str | None = None
    engine: str | None = None
    kernels: str | None = None
    vision: str | None = None
    shrink_on_load: bool | None = None
    device: str | None = None
    sampling: str | None = None
    longest: int | None = None
    prompts: Sequence[Sequence[str]] | None = None
    template: str | None = None
    score: str | None = None
    kv: str | None = None
    exit_in_prefill: bool | None = None
    visual_keep: float | None = None
    visual_ranking: str | None = None
    shortlist: bool | None = None
    thresholds: Mapping[str, float] | None = None
    first: Mapping[str, float] | None = None
    gates: Mapping[str, float] | None = None
    weights: Mapping[str, float] | None = None

    @classmethod
    def of(
        cls, backbone: Backbone, policy: ExitPolicy, *, engine: str | None = None, **known: Any
    ) -> Conditions:
        """Where a backbone answers by a policy. engine: a runtime's name; None: PyTorch. known:
        sampling, longest, prompts and `of_processor`."""
        policy = resolved(policy, backbone)
        by_depth = ("thresholds", "first")
        policies: dict[str, Any] = {
            name: Thresholds(getattr(policy, name)).to_json() for name in by_depth
        }
        plain = ("score", "kv", "shortlist", "exit_in_prefill", "visual_keep")
        policies |= {name: getattr(policy, name) for name in plain}
        policies |= {name: {} for name in ("gates", "weights")}  # of earlier versions
        policies["visual_ranking"] = policy.visual_ranking if policy.visual_keep < 1 else None
        return cls(
            dtype=str(backbone.dtype).removeprefix("torch."),
            quantized=scheme(backbone.layers) or "",
            engine=engine or TORCH,
            kernels=None if engine else kernels(backbone),
            vision=backbone.vision_engine,
            device=backbone.device.type,
            **policies,
            **known,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Conditions:
        """What `to_json` gave; names of later versions are left out."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: part for name, part in value.items() if name in names})


def of_processor(processor: Any) -> dict[str, Any]:
    """The conditions that are a processor's."""
    shrunk = smallest_side(processor) is not None
    return {"template": template_digest(processor), "shrink_on_load": shrunk}


def template_digest(processor: Any) -> str:
    """Of a processor's chat template; "" where it has none."""
    template = getattr(processor, "chat_template", None)
    return hashlib.sha256(str(template).encode()).hexdigest()[:16] if template else ""


def kernels(backbone: Backbone) -> str:
    """What PyTorch multiplies a backbone's layers by; see `Conditions`."""
    if backbone.decoding.compiled:
        return "compiled"
    if backbone.decoding.exact_batches:
        return "exact-batch"
    packed = any(isinstance(part, PrepackedLinear) for part in backbone.layers.modules())
    return "prepacked" if packed else "plain"


_WORDS: Mapping[str, str] = {
    "dtype": "precision {here} where {then} was calibrated",
    "quantized": "weights in {here} where {then} was calibrated",
    "engine": "answers of {here} where those of {then} were calibrated",
    "kernels": "{here} kernels where {then} ones were calibrated",
    "vision": "a vision tower in {here} where one in {then} was calibrated",
    "shrink_on_load": "JPEGs decoded {here} where {then} when calibrated",
    "device": "on {here} where {then} was calibrated",
    "sampling": "{here} where {then} decoding was calibrated",
    "longest": "answers of up to {here} tokens where up to {then} were calibrated",
    "prompts": "a prompt unlike the calibrated ones",
    "template": "another chat template than the calibrated one",
    "score": "score {here} where {then} was calibrated",
    "kv": "keys and values by {here} where {then} was calibrated",
    "exit_in_prefill": "first tokens {here} where they {then} when calibrated",
    "visual_keep": "{here} of the visual tokens where {then} were calibrated",
    "visual_ranking": "visual tokens by {here} where by {then} were calibrated",
    "shortlist": "{here} where calibrated {then}",
    "thresholds": "thresholds {here} where {then} were calibrated",
    "first": "thresholds of first tokens {here} where {then} were calibrated",
    "gates": "gates {here} where {then} were calibrated",
    "weights": "weights of exits {here} where {then} were calibrated",
}


def differences(then: Conditions, here: Conditions, *, risk: str = "disagreement") -> list[str]:
    """What differs from the calibration, a phrase each. What is not known `here` is not compared.

    risk: where answers are cut shorter, fewer differ from the full model's; of other risks that is
    not known.
    """
    found = []
    for name, words in _WORDS.items():
        before, now = getattr(then, name), getattr(here, name)
        if now is None or _alike(name, before, now, then, here, risk):
            continue
        found.append(words.format(here=_shown(name, now), then=_shown(name, before)))
    return found


def _alike(name: str, before: Any, now: Any, then: Conditions, here: Conditions, risk: str) -> bool:
    if name == "prompts":
        return before is not None and all(fits(prompt, before) for [prompt] in now)
    if name == "longest":
        shorter = before is not None and now < before and risk == "disagreement"
        return before == now or shorter
    if name == "first":  # calibrations from before there were any do not name them
        return bool((before or {}) == now)
    if name == "shrink_on_load":
        return bool(bool(before) == now)
    if name in _VISUAL:
        return bool((before or _VISUAL[name]) == now)
    if name == "vision":  # the same, before there was a choice
        before = before or TORCH
    in_torch = here.engine == TORCH  # a runtime that rounds states to 8 bits lets a last bit grow
    same = name in SAME_IN_FLOAT32 and IN_BF16 not in (before, now)
    if same and in_torch and {then.dtype, here.dtype} == {"float32"}:
        return not (then.quantized or here.quantized) or before == now
    return bool(before == now)


def _shown(name: str, value: Any) -> str:
    if name == "quantized":
        return value or "float"
    if name == "exit_in_prefill":
        return "may exit" if value else "ran whole"
    if name == "shrink_on_load":
        return "smaller" if value else "whole"
    if name in _VISUAL:
        value = value or _VISUAL[name]
        return f"{value:.0%}" if isinstance(value, float) else str(value)
    if name == "shortlist":
        return "with a shortlist" if value else "without a shortlist"
    if name == "prompts":
        kinds = [" ... ".join(map(repr, frame)) for frame in value or ()]
        more = [f"and {len(kinds) - FRAMES} more"] if len(kinds) > FRAMES else []
        return ", ".join(kinds[:FRAMES] + more)
    if isinstance(value, Mapping):
        return ", ".join(f"{depth}: {number:g}" for depth, number in value.items()) or "none"
    return "unknown" if value is None else str(value)


# -- what is guaranteed ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Promise:
    """P(risk <= target) >= confidence, over images like the n of the calibration.

    unit: "image": the risk of an image is the mean of what its answers lose; "answer": all answers
    count alike.
    """

    risk: str
    target: float
    confidence: float
    unit: str = "image"
    n: int = 0

    @property
    def claim(self) -> str:
        """As a sentence's end, with its unit."""
        return f"{risk_words(self.risk, self.unit)} is at most {self.target:g}"


def risk_words(risk: str, unit: str) -> str:
    """A risk with its unit, for the start of a sentence."""
    what = {
        "disagreement": "share of answers that differ from the full model's",
        "consistency": "1 - ROUGE-L against the full model's answer",
        "exact_match_drop": "drop of exact match with people's answers",
        "rouge_l_drop": "drop of ROUGE-L against people's answers",
        "vqa_accuracy_drop": "drop of VQA accuracy",
    }.get(risk, risk.replace("_", " "))
    if unit == "image":
        return f"the mean over images of the {what}"
    return f"the {what}" if risk == "disagreement" else f"the mean over answers of the {what}"


@dataclass(frozen=True)
class Standing:
    """promise: what is guaranteed here; None: nothing. why: what stands against a calibration that
    there is; empty where there is none, or where it found nothing to guarantee."""

    promise: Promise | None = None
    why: str = ""

    @property
    def sentence(self) -> str:
        """For people; empty where there is nothing to say."""
        if self.promise is not None:
            return f"guaranteed with {self.promise.confidence:.0%} confidence: {self.promise.claim}"
        return f"not guaranteed here: {self.why}" if self.why else ""


def standing(calibration: Mapping[str, Any] | None, here: Conditions) -> Standing:
    """What a calibration guarantees under these conditions."""
    if not calibration or calibration.get("measured") is None:
        return Standing()
    missing = [name for name in NEEDED if calibration.get(name) is None]
    if missing:
        said = ", ".join(missing)
        return Standing(why=f"the calibration does not say {said}, so it needs to be made again")
    target, confidence = calibration["target"], calibration["confidence"]
    if not (_is_share(target) and _is_share(confidence)):
        return Standing(why=f"a target of {target} at a confidence of {confidence} says nothing")
    bound = calibration.get("bound")
    if not isinstance(bound, int | float) or not bound <= target + 1e-6:
        return Standing(why=f"the risk was bounded by {bound}, and {target} was to be shown")
    then = Conditions.from_json(calibration["conditions"])
    found = differences(then, here, risk=calibration["risk"])
    if found:
        return Standing(why="; ".join(found))
    names = ("risk", "target", "confidence", "unit", "n")
    return Standing(Promise(**{name: calibration[name] for name in names}))


def shown_conditions(calibration: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """A calibration's conditions in words, by name."""
    then = Conditions.from_json((calibration or {}).get("conditions") or {})
    named = ((field.name.replace("_", " "), field.name) for field in fields(then))
    values = [(words, name, getattr(then, name)) for words, name in named]
    return [(words, _shown(name, value)) for words, name, value in values if value is not None]


def under(here: Conditions, **known: Any) -> Conditions:
    """The same conditions with what a request adds."""
    return replace(here, **known)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < 1
