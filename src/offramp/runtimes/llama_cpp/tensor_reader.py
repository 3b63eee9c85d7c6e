"""What exits and the full model of a chain say next, where requests have rules of Hugging Face's.

Between two calls of llama.cpp there are numbers and numpy, and no tensors: the weights went through
the processor's caches, where each of PyTorch's calls costs ten times what it costs in a loop of its
own, a fifth of a small model's token. Where a request has rules of its own, or a score is not the
plain one, tensors over the same memory take their way (`ExitReader`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from offramp.adapter import Adapter
from offramp.engine.confidence import SCORES, max_probability
from offramp.engine.decoding.exit_reader import ExitReader
from offramp.engine.decoding.reader import Looks, Question, Word, anyone
from offramp.engine.decoding.rule import Verdict
from offramp.engine.exit_check import ExitOutput
from offramp.engine.policy import ExitPolicy
from offramp.models.shortlist import Gate
from offramp.runtimes.llama_cpp.architectures import array_of
from offramp.runtimes.llama_cpp.array_reader import ArrayReader
from offramp.runtimes.llama_cpp.executor import ChainOutput


class TensorReader(ExitReader):
    """Asks exits and LM head of a chain, which come with their logits."""

    def __init__(self, adapter: Adapter, policy: ExitPolicy, depths: Sequence[int]) -> None:
        exits = adapter.exits if depths else None
        super().__init__(adapter.backbone, exits, policy, depths)
        self._arrays: ArrayReader | None = None
        own = exits is not None and exits.score is not None
        if SCORES.get(policy.score) is max_probability and not own:
            shortlist = None if self._scorer is None else self._scorer.shortlist
            self._arrays = ArrayReader(
                policy,
                {depth: _numbers(gate) for depth, gate in self._gates.items()},
                None if shortlist is None else shortlist.cpu().numpy(),
            )

    def looks(self, asked: Sequence[Question | None]) -> Looks:
        return anyone  # segments run their exits in any case

    def verdicts(
        self, depth: int, output: Any, asked: Sequence[Question | None]
    ) -> list[Verdict | Exception | None]:
        if self._arrays is not None and all(q is None or q.sampler.plain for q in asked):
            return self._arrays.verdicts(depth, output, asked)
        return super().verdicts(depth, _tensors(output), asked)

    def words(self, final: Any) -> Word:
        """final: logits [n, V], as a chain ends with."""
        return self.of_logits(final)

    def of_logits(self, logits: Any) -> Word:
        def word(place: int, question: Question) -> int:
            if question.sampler.plain:
                return int(logits[place].argmax())
            row = torch.from_numpy(logits[place : place + 1].copy())  # a rule may keep it
            return int(question.sampler.choose(row, question.before))

        return word


def _tensors(output: ChainOutput) -> ExitOutput:
    """Over the same memory."""
    entry, logits = torch.from_numpy(output.entry), torch.from_numpy(output.logits)
    return ExitOutput(entry, None, logits=logits)


def _numbers(gate: Gate) -> tuple[Any, float]:
    return array_of(gate.weight), float(gate.bias)
