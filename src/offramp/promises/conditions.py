"""Conditions of a guarantee: what of a decoding may change an answer, and how two of them differ.

They are composed of parts. Each part (backbone, policy, exits, processor, arithmetic, request) says
in a mapping what of it may change an answer; whatever is in one is compared by name, and a name
that no `Rule` knows has to be equal.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from offramp.core.decoding.policy import ExitPolicy, Thresholds, policy_entries, resolved
from offramp.core.errors import InputError
from offramp.core.models.as_loaded import DIGITS, as_loaded, exits_digest
from offramp.core.models.backbone import Backbone
from offramp.core.models.change import tokens_of
from offramp.core.models.weights import scheme
from offramp.features.input_processor import COMPLETES, smallest_side
from offramp.features.quantized.prepacked import PrepackedLinear
from offramp.features.vision_engine import ROUNDED
from offramp.inputs.control import WRITTEN
from offramp.promises.prompt_kinds import FRAMES, OTHER, fits

TORCH = "torch"
"""The engine of an adapter that answers by itself, one by one or in slots."""
SPEED = ("lossless", "drafts", "max_draft", "guesses")
"""Entries of a policy that change no early answer."""


class Conditions(Mapping[str, Any]):
    """The circumstances that may change an answer, by name, as JSON; None or missing: unknown.

    The names of the parts: see `of_backbone`, `of_policy`, `of_exits`, `of_processor` and
    `of_arithmetic`. For a request also: sampling ("greedy", or how else tokens are chosen), longest
    (tokens of the longest answer) and prompts (frames of `offramp.promises.prompt_kinds`; for a
    request, its one prompt). any_prompt: the calibrated prompts share no words, and answers show
    which requests are like them (`offramp.promises.likeness`).
    """

    def __init__(self, values: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        self._values = {**(values or {}), **more}

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        policy: ExitPolicy,
        *,
        engine: str | None = None,
        exits: Any = None,
        **known: Any,
    ) -> Conditions:
        """Return the conditions of a backbone that answers by a policy. engine: a runtime's name;
        None: PyTorch. exits: their modules. known: of a request, and `of_processor`."""
        sampled = samples(backbone)
        parts: tuple[Mapping[str, Any], ...] = (
            of_backbone(backbone, engine),
            of_policy(resolved(policy, backbone)),
            {} if engine else of_arithmetic(backbone),
            {} if exits is None or engine else of_exits(exits),
            {name: value(backbone) for name, value in PARTS.items()},
            {"sampling": "sampled" if sampled else "greedy"},
            {name: value for name, value in known.items() if value is not None},
        )
        return cls({name: value for part in parts for name, value in part.items()})

    @classmethod
    def of_calibration(cls, calibration: Mapping[str, Any] | None) -> Conditions:
        """Return the conditions in an adapter's calibration; empty without a calibration."""
        return cls((calibration or {}).get("conditions") or {})

    def under(self, **known: Any) -> Conditions:
        """Return the same conditions with other or further values."""
        return Conditions({**self._values, **known})

    def at(self, point: Mapping[int, float] | None) -> Conditions:
        """Return the conditions of the policy `moved` to a point; None: unchanged."""
        if point is None:
            return self
        if self.get("trust", -1.0) >= 0:
            return self.under(trust=min(point.values()))
        first = {d: t for d, t in (self.get("first") or {}).items() if int(d) in point}
        return self.under(thresholds=Thresholds(point).to_json(), first=first)

    def to_json(self) -> dict[str, Any]:
        return dict(self._values)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Conditions({self._values})"


def place(engine: str | None, vision: str | None) -> str:
    """Return where answers come from, by which calibrations are kept: the name of the decoder's
    engine, and of the vision tower's; None: PyTorch."""
    name = engine or TORCH
    return name if vision in (None, TORCH) else f"{name}, vision tower in {vision}"


# -- parts -----------------------------------------------------------------------------------------


def of_backbone(backbone: Backbone, engine: str | None = None) -> dict[str, Any]:
    """Return the conditions that a backbone sets.

    dtype: of the backbone. quantized: scheme of the layers' weights; "" for none. engine: "torch",
    or a runtime's name with its number format. kernels: see `kernels`. vision: the vision tower's
    engine. device: its kind. parameters: whether they are those that were loaded.
    """
    return {
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "quantized": scheme(backbone.layers) or "",
        "engine": engine or TORCH,
        "kernels": None if engine else kernels(backbone),
        "vision": backbone.vision_engine,
        "device": backbone.device.type,
        "parameters": _AS_LOADED if as_loaded(backbone) else _CHANGED,
    }


def of_policy(policy: ExitPolicy) -> dict[str, Any]:
    """Return a policy's entries without those of speed alone. Policies of earlier versions with
    gates, weights or omitted visual tokens guarantee nothing. trust: -1 where thresholds decide;
    with trust, answers depend on where a round of drafts ends."""
    entries = {name: told for name, told in policy_entries(policy).items() if name not in SPEED}
    if policy.trust is None:
        return {**entries, "trust": -1.0}
    return {**entries, "max_draft": policy.max_draft}


def of_exits(exits: Any) -> dict[str, Any]:
    """Return the digest of the exits' tensors as "exits"; None where the weights are laid out for a
    CPU and their digest was not taken before."""
    return {"exits": exits_digest(exits.modules)}


def of_processor(processor: Any) -> dict[str, Any]:
    """Return the conditions that a processor sets; None where it does not say.

    template: digest of the chat template, "" for none. shrink_on_load: whether JPEGs are decoded no
    larger than needed. pixels: settings of the image processor. tokens: digest of the tokenizer's
    vocabulary, and of one tokenised text.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    known, digest = _TOKENS.get(processor, (None, None))
    if known != (now := tokens_of(tokenizer)):
        _TOKENS[processor] = now, (digest := _tokens_digest(tokenizer))
    return {
        "template": template_digest(processor),
        "shrink_on_load": smallest_side(processor) is not None,
        "pixels": _pixels(getattr(processor, "image_processor", None)),  # may be set at any time
        "tokens": digest,
    }


def of_arithmetic(backbone: Backbone) -> dict[str, Any]:
    """Return PyTorch's precision settings. autocast: the precision that it casts to in this thread;
    "" for none. matmul: its setting for float32 matrix multiplication."""
    kind = backbone.device.type
    cast = torch.is_autocast_enabled(kind)
    return {
        "autocast": str(torch.get_autocast_dtype(kind)).removeprefix("torch.") if cast else "",
        "matmul": torch.get_float32_matmul_precision(),
    }


def samples(backbone: Backbone, options: Mapping[str, Any] | None = None) -> bool:
    """Return True if tokens are sampled, by a call's options or else by the model's generation
    configuration."""
    config = getattr(backbone.model, "generation_config", None)
    return bool({"do_sample": getattr(config, "do_sample", False), **(options or {})}["do_sample"])


def template_digest(processor: Any) -> str:
    """Return the digest of a processor's chat template; "" for none, or for a template that only
    completes prompts."""
    template = getattr(processor, "chat_template", None)
    return _digest(str(template)) if template and template != COMPLETES else ""


def kernels(backbone: Backbone) -> str:
    """Return how PyTorch multiplies by a backbone's layers: "plain", "prepacked", "exact-batch" or
    "compiled"."""
    if backbone.decoding.instead is not None:
        return backbone.decoding.instead.name
    if backbone.decoding.exact_batches:
        return "exact-batch"
    return "prepacked" if _is_prepacked(backbone.layers) else "plain"


def _is_prepacked(modules: nn.Module) -> bool:
    return any(isinstance(part, PrepackedLinear) for part in modules.modules())


_TOKENS: WeakKeyDictionary[Any, tuple[Any, str | None]] = WeakKeyDictionary()
_NAMES = ("_name_or_path", "name_or_path", "_processor_class", "processor_class")
"""Of a processor's settings, what says where it came from and changes nothing."""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:DIGITS]


def _pixels(look: Any) -> dict[str, Any] | None:
    if not hasattr(look, "to_dict"):
        return None
    said = json.loads(json.dumps(look.to_dict(), sort_keys=True, default=str))
    return {name: value for name, value in said.items() if name not in _NAMES}


def _tokens_digest(tokenizer: Any) -> str | None:
    """The digest of a tokenizer: its vocabulary, and what it puts around a text."""
    if not hasattr(tokenizer, "get_vocab"):
        return None
    tried = None
    with suppress(Exception):  # a made-up tokenizer may take no text alone
        tried = list(tokenizer("What is it? 12 ")["input_ids"])
    return _digest(json.dumps([sorted(tokenizer.get_vocab().items()), tried], default=str))


_AS_LOADED, _CHANGED = "as loaded", "changed after they were loaded"


# -- rules -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """A condition at calibration (`then`) and now (`here`), among all others. risk: the calibrated
    one."""

    before: Any
    now: Any
    then: Conditions
    here: Conditions
    risk: str

    @property
    def equal(self) -> bool:
        return bool(self.before == self.now)

    @property
    def in_float32(self) -> bool:
        return {self.then.get("dtype"), self.here.get("dtype")} == {"float32"}


@dataclass(frozen=True)
class Rule:
    """The rule by which a condition is compared and described.

    words: description of a difference, with {here} and {then}. alike: whether two values give the
    same answers. shown: the value for people. before: the value of calibrations that do not state
    it; `UNSAID`: unknown, so that it is not compared.
    """

    words: str
    alike: Callable[[Compared], bool] = lambda compared: compared.equal
    shown: Callable[[Any], str] = str
    before: Any = None


UNSAID = object()


def _keeps_answers(compared: Compared) -> bool:
    """Of what changes no answer of PyTorch in float32; docs/watch.md lists it, and
    tests try it. A runtime that rounds states to 8 bits lets a last bit grow."""
    if compared.equal:
        return True
    torch_here = compared.here.get("engine") == TORCH
    rounded = not ROUNDED.keys().isdisjoint((compared.before, compared.now))
    quantized = compared.then.get("quantized") or compared.here.get("quantized")
    return torch_here and compared.in_float32 and not (rounded or quantized)


def _longest(compared: Compared) -> bool:
    """Whether answers are no longer than calibrated: shorter ones differ less often. Other risks
    may not fall with the length."""
    before, now = compared.before, compared.now
    shorter = before is not None and now < before and compared.risk == "disagreement"
    return bool(before == now or shorter)


def _same_settings(compared: Compared) -> bool:
    """Whether the settings that both name are equal: another library version may name more."""
    before, now = compared.before, compared.now
    return all(before[name] == now[name] for name in before if name in now)


def _prompts(compared: Compared) -> bool:
    """Where prompts share no words, any question may come; whether one is like them its answer
    tells. Turns of a conversation are of a kind or of none."""
    before, any_text = compared.before, compared.then.get("any_prompt")
    return before is not None and all(
        fits(prompt, before) or (any_text and not prompt.startswith((OTHER, WRITTEN)))
        for [prompt] in compared.now
    )


def _shown_prompts(frames: Any) -> str:
    kinds = [" ... ".join(map(repr, frame)) for frame in frames or ()]
    more = [f"and {len(kinds) - FRAMES} more"] if len(kinds) > FRAMES else []
    return ", ".join(kinds[:FRAMES] + more)


def _by_depth(values: Any) -> str:
    return ", ".join(f"{depth}: {number:g}" for depth, number in (values or {}).items()) or "none"


def _trust(value: float) -> str:
    return "none" if value < 0 else f"{value:g}"


RULES: dict[str, Rule] = {
    "dtype": Rule("precision {here} where {then} was calibrated"),
    "quantized": Rule(
        "weights in {here} where {then} was calibrated", shown=lambda v: v or "float"
    ),
    "engine": Rule("answers of {here} where those of {then} were calibrated"),
    "kernels": Rule("{here} kernels where {then} ones were calibrated", _keeps_answers),
    "vision": Rule(
        "a vision tower in {here} where one in {then} was calibrated", _keeps_answers, before=TORCH
    ),
    "device": Rule("on {here} where {then} was calibrated"),
    "parameters": Rule("weights of the backbone {here}", before=_AS_LOADED),
    "exits": Rule(
        "other weights of the exits than the calibrated ones",
        lambda c: c.equal or c.then.get("dtype") != c.here.get("dtype"),
        before=UNSAID,
    ),
    "template": Rule("another chat template than the calibrated one"),
    "shrink_on_load": Rule(
        "JPEGs decoded {here} where {then} when calibrated",
        shown=lambda v: "smaller" if v else "whole",
        before=False,
    ),
    "pixels": Rule(
        "another image processor than the calibrated one",
        _same_settings,
        shown=lambda v: str(v.get("image_processor_type", "")),
        before=UNSAID,
    ),
    "tokens": Rule("another tokenizer than the calibrated one", before=UNSAID),
    "autocast": Rule(
        "autocast to {here} where {then} was calibrated", shown=lambda v: v or "none", before=""
    ),
    "matmul": Rule(
        "float32 matrix multiplication of precision {here} where {then} was calibrated",
        lambda c: c.equal or not c.in_float32,
        before="highest",
    ),
    "sampling": Rule("{here} where {then} decoding was calibrated"),
    "longest": Rule("answers of up to {here} tokens where up to {then} were calibrated", _longest),
    "any_prompt": Rule("", lambda compared: True, lambda v: "yes" if v else "no"),
    "prompts": Rule("a prompt unlike the calibrated ones", _prompts, _shown_prompts),
    "score": Rule("score {here} where {then} was calibrated"),
    "kv": Rule("keys and values by {here} where {then} was calibrated"),
    "exit_in_prefill": Rule(
        "first tokens {here} where they {then} when calibrated",
        shown=lambda v: "may exit" if v else "ran whole",
    ),
    "visual_keep": Rule(
        "{here} of the visual tokens where {then} were calibrated",
        shown=lambda v: f"{v:.0%}",
        before=1.0,
    ),
    "shortlist": Rule(
        "{here} where calibrated {then}",
        shown=lambda v: "with a shortlist" if v else "without a shortlist",
    ),
    "thresholds": Rule("thresholds {here} where {then} were calibrated", shown=_by_depth),
    "trust": Rule("a trust of {here} where {then} was calibrated", shown=_trust, before=-1.0),
    "first": Rule(
        "thresholds of first tokens {here} where {then} were calibrated", shown=_by_depth, before={}
    ),
    "gates": Rule("gates {here} where {then} were calibrated", shown=_by_depth, before={}),
    "weights": Rule(
        "weights of exits {here} where {then} were calibrated", shown=_by_depth, before={}
    ),
}
"""By name."""


PARTS: dict[str, Callable[[Backbone], Any]] = {}
"""What plug-ins say of a backbone that may change an answer, by name."""


def register_condition(name: str, value: Callable[[Backbone], Any], words: str = "") -> None:
    """Make guarantees hold only where `value` of the backbone is the same as at calibration.

    value: as JSON, such as the version of kernels; None: unknown, so that it is not compared.
    words: description of a difference, with {here} and {then}.

    Raises:
        InputError: the name is that of a built-in condition.
    """
    if name in RULES and name not in PARTS:
        raise InputError(f"{name!r} is a condition that ships.", "Choose another name.")
    PARTS[name] = value
    RULES[name] = Rule(words or rule_of(name).words, before=UNSAID)


def rule_of(name: str) -> Rule:
    """Return the rule of a condition; without a rule of its own, values must be equal."""
    words = name.replace("_", " ")
    return RULES.get(name) or Rule(f"{words} {{here}} where {{then}} was calibrated", before=UNSAID)


def differences(then: Conditions, here: Conditions, *, risk: str = "disagreement") -> list[str]:
    """Return the differences from the calibration, a phrase each. Unknown values of `here` are not
    compared. risk: the calibrated one."""
    order = [*RULES, *(name for name in here if name not in RULES)]
    found = []
    for name in (name for name in order if here.get(name) is not None):
        rule, before, now = rule_of(name), then.get(name), here[name]
        before = rule.before if before is None else before
        if before is UNSAID or rule.alike(Compared(before, now, then, here, risk)):
            continue
        found.append(rule.words.format(here=shown(name, now), then=shown(name, before)))
    return found


def shown(name: str, value: Any) -> str:
    """A condition's value for people."""
    return "unknown" if value is None else rule_of(name).shown(value)
