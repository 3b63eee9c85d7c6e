"""One greedy row without processors: its tokens are known as numbers on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from offramp.engine.prefill import Prepared
from offramp.engine.sampling import SequenceState


class GreedyRow(SequenceState):
    """One greedy row without processors: what costs a small model a tenth of a token is left out.

    Token ids lie in one buffer, logits are not copied, and ends are looked up as numbers.
    """

    def __init__(self, prepared: Prepared, streamer: Any = None) -> None:
        super().__init__(prepared, streamer)
        known = (MaxLengthCriteria, EosTokenCriteria)
        self._others = [c for c in self._criteria if type(c) not in known]
        self.longest: int | None = self._criteria.max_length
        self._ends = frozenset([] if self._eos is None else self._eos.tolist())
        self._buffer = prepared.ids.new_zeros(1, 2 * prepared.ids.shape[1] + 64)
        self._buffer[:, : self.ids.shape[1]] = self.ids
        self._live = 1
        self._one = torch.ones(1, dtype=torch.bool)

    @classmethod
    def fits(cls, prepared: Prepared) -> bool:
        """Whether the next token is the largest logit, whatever stands before it."""
        return len(prepared.ids) == 1 and not prepared.config.do_sample and not prepared.processors

    @property
    def live(self) -> int:
        return self._live

    def process(self, logits: Tensor, ids: Tensor | None = None) -> Tensor:
        return logits

    def emit(self, tokens: Tensor, depths: Tensor, scores: Tensor) -> None:
        length = self.ids.shape[1]
        if length == self._buffer.shape[1]:
            self._buffer = torch.cat([self._buffer, torch.zeros_like(self._buffer)], 1)
        self._buffer[0, length] = tokens[0]
        self.ids = self._buffer[:, : length + 1]
        self.trace.append((self._one, depths, scores))
        self._tell(tokens, depths, scores)
        stops = [bool(stop(self.ids, None)) for stop in self._others]
        self._live = int(not (self.would_end(self.ids) or any(stops)))

    def would_end(self, ids: Tensor) -> bool:
        if self.longest is not None and ids.shape[1] >= self.longest:
            return True
        return bool(self._ends) and int(ids[0, -1]) in self._ends
