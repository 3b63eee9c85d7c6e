"""One row, whose tokens are numbers: as Hugging Face's processors want it, or greedy and quick."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from offramp.engine.policy import GenerationOutput
from offramp.engine.prefill import Prepared
from offramp.engine.sampling import SequenceState


class OneRow(SequenceState):
    """A batch of one row."""

    @property
    def last(self) -> int:
        """The last token."""
        return int(self.ids[0, -1])

    def write(self, token: int, depth: int, score: float) -> None:
        """Write one token."""
        tokens = torch.tensor([token], device=self.ids.device)
        self.emit(tokens, torch.tensor([depth]), torch.tensor([score]))

    def after(self, tokens: Sequence[int]) -> Tensor:
        """Ids [1, T] with `tokens` behind them."""
        return torch.cat([self.ids, self.ids.new_tensor([tokens])], 1) if tokens else self.ids

    def ends(self, tokens: Sequence[int]) -> bool:
        """Whether writing `tokens` would finish the row."""
        return self.would_end(self.after(tokens))


class GreedyRow(OneRow):
    """A greedy row without processors, written without tensors.

    length: of its tokens, with the prompt's.

    Between two tokens the weights went through the processor's caches, where each of PyTorch's
    calls then costs ten times what it costs in a loop of its own: a fifth of a small model's token.
    """

    def __init__(self, prepared: Prepared, streamer: Any = None) -> None:
        """prepared: of one row, with ids on the CPU."""
        super().__init__(prepared, streamer)
        known = (MaxLengthCriteria, EosTokenCriteria)
        self._others = [c for c in self._criteria if type(c) not in known]
        self.longest: int | None = self._criteria.max_length
        self._ends = frozenset([] if self._eos is None else self._eos.tolist())
        self._buffer = prepared.ids.new_zeros(1, 2 * prepared.ids.shape[1] + 64)
        self._buffer[:, : self.ids.shape[1]] = self.ids
        self._numbers = self._buffer.numpy()[0]
        self._steps: list[tuple[int, float]] = []
        self.length: int = self.ids.shape[1]
        self._last = -1
        self._live = 1

    @classmethod
    def fits(cls, prepared: Prepared) -> bool:
        """Whether the next token is the largest logit, whatever stands before it."""
        return len(prepared.ids) == 1 and not prepared.config.do_sample and not prepared.processors

    @property
    def live(self) -> int:
        return self._live

    @property
    def last(self) -> int:
        return self._last

    def write(self, token: int, depth: int, score: float) -> None:
        if self.length == len(self._numbers):
            self._buffer = torch.cat([self._buffer, torch.zeros_like(self._buffer)], 1)
            self._numbers = self._buffer.numpy()[0]
        self._live = int(not self.ends((token,)))
        self._numbers[self.length] = self._last = token
        self.length += 1
        self._steps.append((depth, score))
        if self._streamer is not None:
            self._tell(*(torch.tensor([value]) for value in (token, depth, score)))
        if self._others:
            self.ids = self._buffer[:, : self.length]
            if any([bool(stop(self.ids, None)) for stop in self._others]):
                self._live = 0

    def ends(self, tokens: Sequence[int]) -> bool:
        length = self.length + len(tokens)
        return (self.longest is not None and length >= self.longest) or tokens[-1] in self._ends

    def output(self, layers: int, rounds: Sequence[tuple[int, int]] = ()) -> GenerationOutput:
        depths, scores = zip(*self._steps, strict=True)
        return GenerationOutput(
            self._buffer[:, : self.length].clone(),
            torch.tensor([depths]),
            torch.tensor([scores]),
            layers,
            tuple(rounds),
        )
