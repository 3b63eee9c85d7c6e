"""The runtime as what a batch engine writes with: a sequence of llama.cpp's for each slot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from offramp.adapter import Adapter
from offramp.engine.decoding.executor import Executor
from offramp.engine.decoding.exit_reader import ExitReader
from offramp.engine.decoding.reader import ReadsPrompts
from offramp.engine.decoding.rule import ExitRule
from offramp.engine.policy import ExitPolicy
from offramp.engine.prefill import Prepared
from offramp.runtimes.llama_cpp.entry import PromptEntry
from offramp.runtimes.llama_cpp.executor import ChainExecutor, ChainPrompt
from offramp.runtimes.llama_cpp.tensor_reader import TensorReader


class LlamaCppHost:
    """One engine's; meanwhile the runtime itself answers nothing."""

    depths: tuple[int, ...]
    drafting: ExitRule | None
    reader: ExitReader

    def __init__(
        self, adapter: Adapter, policy: ExitPolicy, executor: ChainExecutor, entry: PromptEntry
    ) -> None:
        self.backbone, self.depths = adapter.backbone, executor.depths
        self.reader = TensorReader(adapter, policy, self.depths)
        self._executor, self.entry, drafter = executor, entry, executor.drafter
        self.drafting = None if drafter is None else drafter.rule(policy)

    def executor(self) -> Executor:
        return self._executor

    def prove(self, inputs: Mapping[str, Any]) -> bool:
        return False  # the runtime did when it was loaded

    def prepare(
        self, inputs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> tuple[Prepared, ReadsPrompts, Any]:
        with torch.inference_mode():
            prepared, [prompt] = self.entry.read(inputs, options)
        return prepared, self._executor, prompt

    def columns(self, prompt: ChainPrompt) -> int:
        return prompt.columns
