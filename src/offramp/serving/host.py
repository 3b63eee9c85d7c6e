"""What a batch engine writes with: what reads prompts, runs the layers and asks the exits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol, TypeGuard

from offramp.adapter import Adapter
from offramp.engine.confidence import check_thresholds
from offramp.engine.decoding.executor import Executor
from offramp.engine.decoding.exit_reader import ExitReader
from offramp.engine.decoding.prompt import PromptReader
from offramp.engine.decoding.reader import ReadsPrompts
from offramp.engine.decoding.rule import ExitRule
from offramp.engine.drafter import Drafter
from offramp.engine.executors.choice import executor_for
from offramp.engine.executors.slots.memory import check_room
from offramp.engine.policy import ExitPolicy
from offramp.engine.prefill import Prepared
from offramp.engine.prefix_cache import PrefixCache
from offramp.engine.self_check import prove
from offramp.models.backbone import Backbone
from offramp.models.exits import Exits, ExitSet
from offramp.models.vision_cache import VisionCache
from offramp.serving.engine_config import EngineConfig


class Host(Protocol):
    """PyTorch's layers, or a runtime's, for one engine.

    depths: of the exits in use, ascending. reader: asks them. drafting: the rule of lossless
    answers whose drafts an exit writes from its own state; None: none does.
    """

    backbone: Backbone
    depths: tuple[int, ...]
    reader: ExitReader
    drafting: ExitRule | None

    def executor(self) -> Executor:
        """What runs the layers, no prompt being there."""
        ...

    def prove(self, inputs: Mapping[str, Any]) -> bool:
        """Find out how the layers can run, at the first prompt; whether it is otherwise than by the
        executor that was made."""
        ...

    def prepare(
        self, inputs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> tuple[Prepared, ReadsPrompts, Any]:
        """As `PromptReader.prepare`; what reads the prompt, which then has `columns`, padding
        included; and what that is given."""
        ...


class Runtime(Protocol):
    """What decodes several answers at a time in PyTorch's place."""

    adapter: Adapter

    @property
    def rows(self) -> int:
        """How many, at most."""
        ...

    @property
    def context(self) -> int:
        """Tokens of a prompt and its answer."""
        ...

    def host(self, policy: ExitPolicy, vision_cache: VisionCache | None = None) -> Host:
        """For the one engine that it decodes for from here on."""
        ...


def is_runtime(model: Any) -> TypeGuard[Runtime]:
    """Whether a model is one, several at a time."""
    return hasattr(model, "host") and model.rows > 1


class TorchHost:
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
        attached = None if exits is None else ExitSet.of(exits)
        check_room(backbone, attached, config.slots, config.limit)
        self.backbone, self._attached, self._config = backbone, attached, config
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

    def prove(self, inputs: Mapping[str, Any]) -> bool:
        if self.backbone.is_proven(self.depths):
            return False
        prove(self.backbone, inputs, self.depths)
        return True

    def prepare(
        self, inputs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> tuple[Prepared, ReadsPrompts, Any]:
        prepared = self._prompts.prepare(inputs, options)
        return prepared, self._prompts, prepared
