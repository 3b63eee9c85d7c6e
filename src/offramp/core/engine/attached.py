"""Exits attached to a backbone, called as a Hugging Face model's `generate` is."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from transformers import GenerationMixin

from offramp.core.decoding.confidence import HEADS
from offramp.core.decoding.plan import Plan
from offramp.core.decoding.policy import FULL, ExitPolicy, GenerationOutput
from offramp.core.engine.generate import generate, generate_prepared
from offramp.core.engine.plan import KeptPlans, plan_of
from offramp.core.errors import InputError
from offramp.core.executors.prefill import IMAGES, Prepared
from offramp.core.executors.prompt import PromptMemory
from offramp.core.models.backbone import Backbone
from offramp.core.models.change import Unchanged
from offramp.core.models.exits import ExitSet

NO_THRESHOLDS = (
    "These exits have no thresholds, so every layer runs for every token. Find thresholds with "
    "`offramp calibrate`, or give some: policy=ExitPolicy({%d: 0.95}). mode='lossless' needs "
    "none where they were trained."
)
"""With the depth of an exit that there is."""


class CalledAsModel:
    """The base of objects that are called as a Hugging Face model's `generate` and exit early by a
    policy: an adapter, or a runtime in PyTorch's place.

    keeps_prompts: whether `generate` takes a `prefix_cache`, and reuses the beginnings of prompts.
    """

    backbone: Backbone
    keeps_prompts: bool = True

    def generate(
        self,
        inputs: Mapping[str, Any] | Tensor | None = None,
        *,
        mode: str | None = None,
        policy: ExitPolicy | None = None,
        **options: Any,
    ) -> GenerationOutput:
        """Generate with early exits, called as a Hugging Face model's `generate`.

        inputs: what the processor returned; or ids [B, T]; or nothing, where all inputs are named,
        as in `generate(**inputs, max_new_tokens=40)`.
        mode: "early_exit", "lossless" or "full", by the same thresholds; None: as the policy says.
        policy: None: the adapter's. options: see `offramp.generate`.

        Raises:
            InputError: an option that is not supported, a prompt without its image, or an option
                that this engine does not have.
        """
        chosen = self._exits_of.chosen_policy(mode, policy)
        if isinstance(inputs, Mapping):
            return self._write(inputs, chosen, **options)
        # Recognised by type or name: a processor's output may have any names.
        read = {n: v for n, v in options.items() if isinstance(v, Tensor) or n.startswith(IMAGES)}
        if inputs is not None:
            read["input_ids"] = inputs
        settings = {name: value for name, value in options.items() if name not in read}
        return self._write(read, chosen, **settings)

    @property
    def _exits_of(self) -> AttachedExits:
        """Return the exits that are used."""
        raise NotImplementedError

    def _write(
        self, inputs: Mapping[str, Any], policy: ExitPolicy, **options: Any
    ) -> GenerationOutput:
        """Write the answers to a processor's output."""
        raise NotImplementedError


@dataclass(repr=False)
class AttachedExits(CalledAsModel):
    """Exits attached to a backbone, and the policy they exit early by.

    As `custom_generate` of the model's own `generate` they decode in its place:
    `model.generate(**inputs, custom_generate=adapter)`.
    """

    backbone: Backbone
    exits: ExitSet
    policy: ExitPolicy = FULL

    def __post_init__(self) -> None:
        self.backbone = Backbone.of(self.backbone)
        self.exits = ExitSet.of(self.exits)
        self._plans = KeptPlans()
        self._stamp: Stamp | None = None

    def _write(
        self, inputs: Mapping[str, Any], policy: ExitPolicy, **options: Any
    ) -> GenerationOutput:
        return generate(self.backbone, inputs, planned=partial(self.plan, policy), **options)

    def plan(self, policy: ExitPolicy | None = None) -> Plan:
        """Return the plan by which answers under a policy, or the adapter's own, are written.

        The newest are kept (`KeptPlans`), as long as backbone and exits are what they were
        (`Stamp`).

        Raises:
            InputError: the policy does not fit the exits.
        """
        policy = self.policy if policy is None else policy
        if self._stamp is None or not self._stamp.holds(self.backbone, self.exits):
            self._plans, self._stamp = KeptPlans(), Stamp(self.backbone, self.exits)
        return self._plans.of(policy, partial(plan_of, self.backbone, self.exits, policy))

    @property
    def _exits_of(self) -> AttachedExits:
        return self

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        *,
        mode: str | None = None,
        policy: ExitPolicy | None = None,
        prefix_cache: PromptMemory | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Decode in place of the model's own loop, as `custom_generate`; see `generate`.

        `model.generate` does not hand the tokenizer of `stop_strings` to a `custom_generate`: for
        these, call `generate` of the adapter.

        Raises:
            InputError: the exits are attached to another model, or an option is not supported.
        """
        rules = (logits_processor, stopping_criteria, generation_config)
        made = generate_prepared(
            self.backbone,
            Prepared(model, input_ids, *rules, model_kwargs),
            partial(self.plan, self.chosen_policy(mode, policy)),
            prefix_cache=prefix_cache,
            streamer=_streamer(),
        )
        asked = getattr(generation_config, "return_dict_in_generate", False)
        return made if asked else made.sequences.clone()

    def chosen_policy(self, mode: str | None, policy: ExitPolicy | None) -> ExitPolicy:
        """Return the policy of a call. Raise `InputError` where the given object is no policy."""
        if not isinstance(policy, ExitPolicy | None):
            thresholds = {self.exits.depths[0]: 0.95}
            raise InputError(
                f"An exit policy cannot be {policy!r}.",
                f"Give policy=ExitPolicy({thresholds}), or a mode: mode='lossless'.",
            )
        chosen = (self.policy if policy is None else policy).in_mode(mode)
        if policy is None and mode != "full" and not self.spares_layers(chosen):
            warnings.warn(NO_THRESHOLDS % self.exits.depths[0], stacklevel=3)
        return chosen

    def spares_layers(self, policy: ExitPolicy) -> bool:
        """Return True if some token may leave early or be drafted by a policy."""
        return bool(policy.thresholds or policy.drafts or (policy.drafting and self.exits.draft_on))


_GENERATE = inspect.unwrap(GenerationMixin.generate).__code__


def _streamer() -> Any:
    """The streamer of the `generate` that calls, for all but the prompt: that hands none to a
    `custom_generate`, tells it of the prompt, and leaves whoever reads it waiting for the end."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not _GENERATE:
        frame = frame.f_back
    streamer = None if frame is None else frame.f_locals.get("streamer")
    if streamer is None:
        return None
    puts: list[Any] = [streamer.put, id]  # of the prompt, no more than that it came
    more = {"step": streamer.step} if hasattr(streamer, "step") else {}

    def put(ids: Tensor) -> None:
        (puts.pop() if len(puts) > 1 else puts[0])(ids)

    return SimpleNamespace(put=put, end=streamer.end, **more)


class Stamp:
    """The state of a model and its exits at one moment; a plan is used only while `holds` is true.

    A change that the detector (`offramp.core.models.change`) sees, other decoding options or new
    findings about the model end it.
    """

    def __init__(self, backbone: Backbone, exits: ExitSet | None) -> None:
        parts = () if exits is None else (exits.modules,)
        self._made_of = backbone, exits
        self._unchanged = Unchanged(lambda: parts)
        self._settings = self._look()

    def holds(self, backbone: Backbone, exits: ExitSet | None) -> bool:
        """Return True if these are the stamped model and exits, unchanged."""
        same = backbone is self._made_of[0] and exits is self._made_of[1]
        return same and self._look() == self._settings and self._unchanged()

    def _look(self) -> list[Any]:
        backbone = self._made_of[0]
        return [
            backbone.version(),
            backbone.decoding,
            backbone.engine,
            backbone.lossless,
            backbone.in_parts,
            backbone.family,
            backbone.tower,
            *HEADS.items(),
        ]
