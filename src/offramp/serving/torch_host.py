"""What a batch engine writes with in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from offramp.core.decoding.executor import Executor
from offramp.core.decoding.plan import Plan
from offramp.core.decoding.policy import FULL, MODES, ExitPolicy, GenerationOutput
from offramp.core.decoding.reader import PrefillBackend
from offramp.core.decoding.sequence import Sequence
from offramp.core.engine.attached import Stamp
from offramp.core.engine.generate import generate, way
from offramp.core.engine.heads import ExitHeads
from offramp.core.engine.plan import KeptPlans, plan_of
from offramp.core.engine.read_again import (
    Case,
    Kept,
    by_model,
    difference,
    has_own_generate,
    own_model,
    shape_of,
    tell,
)
from offramp.core.engine.sampler import Sampler, SeededNoise
from offramp.core.errors import InputError
from offramp.core.executors.prefill import Prepared, prepare, within
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet
from offramp.core.models.readings import OWN
from offramp.features.prefix_cache import PrefixCache
from offramp.features.vision_cache import VisionCache
from offramp.serving.engine_config import EngineConfig
from offramp.serving.host import CheckRoom, OnSettled, Opened
from offramp.serving.job import tokens_of
from offramp.serving.request import Request
from offramp.serving.slot_memory import check_room


class PreparedHost:
    """The base of hosts whose prompts Hugging Face prepares: requests have a processor's inputs and
    options of `generate`."""

    plan: Plan

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone

    def tokens(self, request: Request) -> int:
        ids = checked_inputs(request.inputs)["input_ids"]
        answers = request.options.get("num_return_sequences") or 1
        if answers != 1:
            raise InputError(
                f"A request asked for {answers} answers (num_return_sequences).",
                "Submit it as often as answers are wanted, each with a seed of its own.",
            )
        if len(ids) != 1:
            raise InputError(
                f"A request of {len(ids)} rows was submitted.",
                "Submit each prompt as a request of its own.",
            )
        if self.backbone.is_encoder_decoder:  # these tokens are the encoder's
            return 0
        return int(ids.shape[-1])

    def positions(self, prompt: int) -> int | None:
        return self.backbone.room(prompt)

    def stale(self, request: Request) -> bool:
        return False

    def renew(self, request: Request) -> bool:
        return False

    def alone(
        self, request: Request, streamer: Any, check_room: CheckRoom
    ) -> GenerationOutput | None:
        return None

    def open(self, request: Request, on_token: OnSettled) -> Opened:
        prepared, reader, given = self.prepare(request.inputs, request.options)
        noise = SeededNoise(request.seed) if prepared.config.do_sample else None
        sampler = Sampler(prepared, noise=noise, on_token=on_token)
        return Opened(reader, given, sampler, sampler.most or 0, prepared.ids)

    def prepare(
        self, inputs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> tuple[Prepared, PrefillBackend, Any]:
        """Return a prompt prepared as by `PromptReader.prepare`, with its reader and that reader's
        input."""
        raise NotImplementedError

    def output(self, ids: Tensor, sequence: Sequence) -> GenerationOutput:
        layers = self.backbone.depth
        told = [sequence.rounds], 0, [sequence.offers]
        return GenerationOutput.of_rows(ids, [sequence.tokens], layers, *told)


class TorchHost(PreparedHost):
    """A backbone in PyTorch, and its exits. between: called between two chunks of a prompt."""

    def __init__(
        self,
        backbone: Backbone,
        exits: ExitSet | Exits | None,
        policy: ExitPolicy,
        config: EngineConfig,
        *,
        between: Callable[[], None],
        vision_cache: VisionCache | None = None,
        prefix_cache: PrefixCache | None = None,
        make_heads: Callable[..., ExitHeads] | None = None,
    ) -> None:
        """Raise `InputError` where the slots would not fit into memory, before any is allocated."""
        super().__init__(backbone)
        attached = None if exits is None else ExitSet.of(exits)
        check_room(backbone, attached, config.slots, config.limit)
        self._attached, self._config, self._policy = attached, config, policy
        self._how: dict[str, Any] = {
            "vision_cache": vision_cache,
            "prefix_cache": prefix_cache,
            "chunk": config.budget,
            "between": between,
        }
        self._make_heads = make_heads
        self._due: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # by sampler
        self._make()

    def _make(self) -> None:
        backbone, exits = self.backbone, self._attached
        self._stamp = Stamp(backbone, exits)
        self.plan: Plan = plan_of(
            backbone, exits, self._policy, modes=MODES, heads=self._make_heads
        )
        self._prompts = self.plan.reader(**self._how)
        self._plans = KeptPlans()  # of requests by themselves

    def executor(self) -> Executor:
        slots, limit = self._config.slots, self._config.limit
        own = self.backbone.has_own_frequencies(limit)
        return self.plan.executor(own_frequencies=own, slots=slots, limit=limit)

    def stale(self, request: Request) -> bool:
        return not self._stamp.holds(self.backbone, self._attached)

    def renew(self, request: Request) -> bool:
        if not self.stale(request):
            return False
        self._prompts.prepare(request.inputs, request.options)  # or it says what is wrong with them
        self._make()
        return True

    def alone(
        self, request: Request, streamer: Any, check_room: CheckRoom
    ) -> GenerationOutput | None:
        """Answer a request by itself: the first of a shape, which the model reads again, and shapes
        that slots do not answer exactly. None for others."""
        backbone, share = self.backbone, self.backbone.decoding.again
        if self._make_heads is not None or (share is None and backbone.tested):
            return None
        plan = self._alone(request)
        readings = backbone.readings
        verdict = readings.verdicts.get(shape_of(backbone, request.inputs, way(plan)))
        own_turn = has_own_generate(backbone.model) or (readings.kept and not backbone.tested)
        if verdict == "slots" and not own_turn:
            return None
        opened = super().open(request, lambda *_: None)
        check_room(opened.ids.shape[-1], opened.longest)
        kept = {name: self._how[name] for name in ("vision_cache", "prefix_cache")}
        return generate(
            backbone,
            request.inputs,
            planned=lambda: plan,
            streamer=streamer,
            seed=request.seed,
            **kept,
            **request.options,
        )

    def _alone(self, request: Request) -> Plan:
        """The plan of a request by itself; at full depth where drafts cannot be taken back."""
        policy = self._policy.asked(
            request.mode, request.thresholds, self.plan.depths, request.point
        )
        if policy.drafting and not self.backbone.lossless:
            policy = FULL
        return self._plans.of(policy, partial(plan_of, self.backbone, self._attached, policy))

    def open(self, request: Request, on_token: OnSettled) -> Opened:
        opened = super().open(request, on_token)
        readings, share = self.backbone.readings, self.backbone.decoding.again
        rule = self.plan.rule(request.mode, request.thresholds, request.point)
        here = "slots", shape_of(self.backbone, request.inputs, (rule.early, rule.uses_exits))
        asked = share is not None or not self.backbone.tested
        first = asked and here not in readings.verdicts
        due = first or bool(share and readings.due(share))
        if due or not self.backbone.tested:
            kept = Kept()
            assert isinstance(opened.sampler, Sampler)
            kept.of(opened.sampler)
            self._due[opened.sampler] = request, kept, here, not rule.early, due
        return opened

    def output(self, ids: Tensor, sequence: Sequence) -> GenerationOutput:
        made = super().output(ids, sequence)
        due = self._due.pop(sequence.sampler, None)
        if due is None:
            return made
        request, kept, shape, exact, asked = due
        tokens = made.depths.shape[1]
        if not asked and not self.backbone.readings.is_longer(shape, tokens):
            return made
        model, options = own_model(self.backbone), request.options
        own = partial(within, model, request.inputs, **options)
        fresh = partial(prepare, model, request.inputs, **options)
        case = Case(self.backbone, request.inputs, fresh, own)
        why = difference(case, made, kept, exact=exact)
        if why is None:
            self.backbone.readings.note(shape, "slots", tokens)
            return made
        alone = shape_of(self.backbone, request.inputs, way(self._alone(request)))
        self.backbone.readings.verdicts[alone] = OWN
        if self.backbone.readings.fail(shape, why):
            tell(self.backbone, why)
        again = by_model(case, None, request.seed)
        sequence.tokens[:] = tokens_of(again)
        return again

    def prepare(
        self, inputs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> tuple[Prepared, PrefillBackend, Any]:
        prepared = self._prompts.prepare(inputs, options)
        return prepared, self._prompts, prepared


def checked_inputs(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return `inputs`; raise `InputError` where they are not a processor's, of one prompt."""
    if "input_ids" not in inputs:
        raise InputError(
            f"A request came without token ids (it has {', '.join(inputs) or 'nothing'}).",
            "Pass what the processor returned: processor(images=image, text=prompt, "
            "return_tensors='pt').",
        )
    ids = inputs["input_ids"]
    if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.dim() != 2:
        shape = getattr(ids, "shape", None)
        came = type(ids).__name__ if shape is None else f"{ids.dtype} of shape {[*shape]}"
        raise InputError(
            f"Token ids are whole numbers in a tensor [1, T], and came as {came}.",
            "Ask the processor for tensors: return_tensors='pt'.",
        )
    return inputs
