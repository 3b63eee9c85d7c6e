"""What a batch engine writes with in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from offramp.engine.confidence import check_thresholds
from offramp.engine.decoding.executor import Executor
from offramp.engine.decoding.exit_reader import ExitReader
from offramp.engine.decoding.prompt import PromptReader
from offramp.engine.decoding.reader import ReadsPrompts
from offramp.engine.decoding.rule import ExitRule
from offramp.engine.decoding.sampler import Sampler, SeededNoise
from offramp.engine.decoding.sequence import Sequence
from offramp.engine.drafter import Drafter
from offramp.engine.executors.choice import executor_for
from offramp.engine.executors.slots.memory import check_room
from offramp.engine.policy import ExitPolicy, GenerationOutput, first_thresholds
from offramp.engine.prefill import Prepared
from offramp.engine.prefix_cache import PrefixCache
from offramp.engine.self_check import prove
from offramp.errors import InputError
from offramp.models.backbone import Backbone
from offramp.models.exits import Exits, ExitSet
from offramp.models.vision_cache import VisionCache
from offramp.serving.engine_config import EngineConfig
from offramp.serving.host import OnSettled, Opened
from offramp.serving.request import Request


class PreparedHost:
    """What hosts share whose prompts Hugging Face prepares: requests are inputs of a processor and
    options of `generate`.

    guess_above: score from which a token that is not confident goes on as a guess.
    """

    reader: ExitReader
    guess_above: float = 0.0

    def __init__(self, backbone: Backbone) -> None:
        self.backbone, self.layers = backbone, backbone.depth

    def rule(self, policy: ExitPolicy) -> ExitRule:
        # A score that follows a token from exit to exit wants it settled before the next.
        guessing = not self.reader.follows
        first = first_thresholds(self.backbone, policy)
        return ExitRule.of(policy, self.guess_above, guessing=guessing, first=first)

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

    def open(self, request: Request, policy: ExitPolicy, on_token: OnSettled) -> Opened:
        prepared, reader, given = self.prepare(request.inputs, request.options)
        noise = SeededNoise(request.seed) if prepared.config.do_sample else None
        sampler = Sampler(prepared, noise=noise, on_token=on_token)
        executor = self.checked_by(request.inputs)
        return Opened(reader, given, sampler, sampler.most or 0, prepared.ids, executor)

    def checked_by(self, inputs: Mapping[str, Any]) -> Executor | None:
        """Find out how the layers can run, at the first prompt; what runs them from there on."""
        return None

    def prepare(
        self, inputs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> tuple[Prepared, ReadsPrompts, Any]:
        """As `PromptReader.prepare`; what reads the prompt, and what that is given."""
        raise NotImplementedError

    def output(self, ids: Tensor, sequence: Sequence) -> GenerationOutput:
        return GenerationOutput.of_rows(ids, [sequence.tokens], self.layers, [sequence.rounds])


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
        make_reader: Callable[..., ExitReader] = ExitReader,
    ) -> None:
        """Raise `InputError` where the slots would not fit into memory, before any is allocated."""
        super().__init__(backbone)
        attached = None if exits is None else ExitSet.of(exits)
        check_room(backbone, attached, config.slots, config.limit)
        self._attached, self._config = attached, config
        self.guess_above = config.guess_above
        self.depths: tuple[int, ...] = ()
        if attached is not None:
            for by_depth in (policy.thresholds, policy.first, policy.drafts):
                check_thresholds(dict(by_depth), attached.depths)
            self.depths = policy.depths
        ahead = replace(policy, lossless=True)
        self._drafter = drafter = Drafter.of(backbone, attached, ahead, self.depths)
        self.drafting = None if drafter is None else drafter.rule
        if drafter is not None and not self.depths:
            self.depths = (drafter.depth,)
        self.reader = make_reader(backbone, attached if self.depths else None, policy, self.depths)
        self._prompts = PromptReader(
            backbone,
            attached,
            self.depths,
            vision_cache=vision_cache,
            prefix_cache=prefix_cache,
            chunk=config.budget,
            between=between,
        )

    def executor(self) -> Executor:
        slots, limit = self._config.slots, self._config.limit
        return executor_for(
            self.backbone, self._attached, self.depths, longest=limit, slots=slots, limit=limit,
            watches=self.reader.watches, drafter=self._drafter,
        )  # fmt: skip

    def checked_by(self, inputs: Mapping[str, Any]) -> Executor | None:
        if self.backbone.is_proven(self.depths):
            return None
        prove(self.backbone, inputs, self.depths)
        return self.executor()

    def prepare(
        self, inputs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> tuple[Prepared, ReadsPrompts, Any]:
        prepared = self._prompts.prepare(inputs, options)
        return prepared, self._prompts, prepared


def checked_inputs(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Raise `InputError` where `inputs` are not a processor's of one prompt."""
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
