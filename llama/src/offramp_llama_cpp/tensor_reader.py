"""What exits and the full model of a chain say next, where requests have rules of Hugging Face's.

Between two calls of llama.cpp there are numbers and numpy, and no tensors: the weights went through
the processor's caches, where each of PyTorch's calls costs ten times what it costs in a loop of its
own, a fifth of a small model's token. Where a request has rules of its own, or a score is not the
plain one, tensors over the same memory take their way (`ExitHeads`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.decoding.reader import Query, Word
from offramp.core.decoding.rule import ExitVerdict
from offramp.core.decoding.scores import SCORES, max_probability
from offramp.core.engine.heads import ExitHeads
from offramp.core.executors.segments import ExitOutput
from offramp_llama_cpp.array_reader import ArrayHeads
from offramp_llama_cpp.executor import ChainOutput


class TensorHeads(ExitHeads):
    """Asks exits and LM head of a chain, which come with their logits."""

    def __init__(self, adapter: Adapter, policy: ExitPolicy, depths: Sequence[int]) -> None:
        exits = adapter.exits if depths else None
        super().__init__(adapter.backbone, exits, policy, depths)
        self._arrays: ArrayHeads | None = None
        own = exits is not None and exits.score is not None
        if policy.score == "max_probability" and not own:
            shortlist = None if self._scorer is None else self._scorer.shortlist
            self._arrays = ArrayHeads(
                policy, None if shortlist is None else shortlist.cpu().numpy()
            )

    def verdicts(
        self, depth: int, output: Any, queries: Sequence[Query | None]
    ) -> list[ExitVerdict | Exception | None]:
        arrays = self._arrays if SCORES["max_probability"] is max_probability else None
        if arrays is not None and all(q is None or q.sampler.plain for q in queries):
            return arrays.verdicts(depth, output, queries)
        return super().verdicts(depth, _tensors(output), queries)

    def words(self, final: Any) -> Word:
        """final: logits [n, V], as a chain ends with."""
        return self.of_logits(final)

    def of_logits(self, logits: Any) -> Word:
        def word(place: int, query: Query) -> int:
            if query.sampler.plain:
                return int(logits[place].argmax())
            row = torch.from_numpy(logits[place : place + 1].copy())  # a rule may keep it
            return int(query.sampler.choose(row, query.before))

        return word


def _tensors(output: ChainOutput) -> ExitOutput:
    """The arrays as tensors over the same memory."""
    entry, logits = torch.from_numpy(output.entry), torch.from_numpy(output.logits)
    return ExitOutput(entry, None, logits=logits)
