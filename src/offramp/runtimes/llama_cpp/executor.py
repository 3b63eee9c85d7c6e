"""The chain of segments as an executor of the one decoder, one answer at a time.

Between two calls of llama.cpp there are numbers and numpy, and no tensors: the weights went through
the processor's caches, where each of PyTorch's calls costs ten times what it costs in a loop of its
own, a fifth of a small model's token. Where a request has rules of its own, or a score is not the
plain one, tensors over the same memory take their way (`ExitReader`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from offramp.adapter import Adapter
from offramp.engine.confidence import SCORES, max_probability
from offramp.engine.decoding.executor import Loaded, Span
from offramp.engine.decoding.exit_reader import ExitReader
from offramp.engine.decoding.reader import Decide, Looks, Question, anyone
from offramp.engine.decoding.rule import CLOSED, Verdict
from offramp.engine.exit_check import ExitOutput
from offramp.engine.policy import ExitPolicy
from offramp.engine.prefill import Prepared
from offramp.runtimes.llama_cpp.chain import Array, SegmentChain
from offramp.runtimes.llama_cpp.native.tap import States


class ChainOutput(NamedTuple):
    """What an exit of the chain made of n tokens, until its segment runs again. entry: the states
    that entered it [n, D]. logits: of what it can say [n, S]."""

    entry: States
    logits: Array

    @property
    def tensors(self) -> ExitOutput:
        """Over the same memory."""
        entry, logits = torch.from_numpy(self.entry), torch.from_numpy(self.logits)
        return ExitOutput(entry, None, logits=logits)


class ChainPrompt(NamedTuple):
    """A prompt that was run. columns: its tokens. logits: of the first token [1, V]; None where it
    exited: then it waits. waits: the depth at whose exit."""

    columns: int
    logits: Array | None
    waits: int | None


class ChainExecutor:
    """Runs a chain for one sequence, whose prompt it reads itself.

    stand: depths of the chain's exits. depths: of those in use. prompt: the states [T, D] of the
    prompt that enter the decoder. embed: the states [1, D] of a token.
    """

    rows: int | None = 1
    propagate = False
    positions: int | None = None

    def __init__(
        self,
        chain: SegmentChain,
        stand: Sequence[int],
        depths: Sequence[int],
        prompt: States,
        embed: Callable[[int], States],
    ) -> None:
        self.depths = tuple(depths)
        self._chain, self._stand, self._embed, self._prompt = chain, tuple(stand), embed, prompt
        self._last = len(chain.segments) - 1
        self._places = [self._stand.index(depth) for depth in depths]

    def read(
        self,
        prepared: Prepared,
        *,
        use_exits: bool = True,
        decide: Decide | None = None,
        looks: Looks = anyone,
    ) -> ChainPrompt:
        """Run the prompt, to full depth or as far as `decide` lets it."""

        def at(exit: int, state: Array, logits: Array) -> bool:
            assert decide is not None
            if exit not in self._places:
                return False
            return decide(self._stand[exit], ChainOutput(state[None], logits[None]))

        chain, columns = self._chain, len(self._prompt)
        place = chain.run(self._prompt, None if decide is None else at)
        if place < self._last:
            return ChainPrompt(columns, None, self._stand[place])
        return ChainPrompt(columns, chain.finish(1), None)

    def load(self, prompt: ChainPrompt, row: int) -> Loaded:
        columns, depths = prompt.columns, self.depths
        ran = len(depths) + 1
        if prompt.waits is not None:
            ran = depths.index(prompt.waits) + 1
        return Loaded(0, columns, [columns] * ran + [0] * (len(depths) + 1 - ran))

    def feed(
        self, handles: Sequence[int], ids: Sequence[int], columns: Sequence[int], looks: Looks
    ) -> ChainOutput:
        place, states = self._places[0], self._embed(ids[0])
        if place == 0:
            return ChainOutput(*self._chain.advance(0, 1, states))
        self._chain.advance(0, 0, states)
        return self._through(1, place, 1)

    def _through(self, start: int, place: int, outputs: int) -> ChainOutput:
        """Run what is pending from the chain's exit at `start` through the one at `place`."""
        for between in range(start, place):
            self._chain.advance(between, 0)
        return ChainOutput(*self._chain.advance(place, outputs))

    def run(
        self, segment: int, spans: Sequence[Span], asked: Sequence[int], looks: Looks
    ) -> ChainOutput | Array:
        total = spans[0].end - spans[0].first
        outputs = total - asked[0] if asked else 0  # llama.cpp has them of the last tokens
        picks = None if len(asked) == outputs else [column - asked[0] for column in asked]
        if segment == len(self.depths):
            logits = self._chain.finish(outputs)
            return logits if picks is None else logits[picks]
        below, place = self._places[segment - 1 : segment + 1]
        entry, logits = self._through(below + 1, place, outputs)
        entry = entry[total - outputs :]
        return (
            ChainOutput(entry, logits)
            if picks is None
            else ChainOutput(entry[picks], logits[picks])
        )

    def full(
        self,
        handles: Sequence[int],
        ids: Sequence[int],
        columns: Sequence[int],
        *,
        exits: bool,
    ) -> Array:
        self._chain.run(self._embed(ids[0]))
        return self._chain.finish(1)

    def trial(
        self, handles: Sequence[int], ids: Sequence[int], columns: Sequence[int]
    ) -> Array | None:
        return None

    def skip(self, handle: int, segment: int) -> None:
        raise NotImplementedError("a chain keeps exact keys and values")

    def allow_crops(self, handle: int) -> bool:
        return True

    def crop(self, handle: int, column: int) -> None:
        self._chain.crop(self._chain.tokens - column)

    def release(self, handle: int) -> None:
        """The next reset forgets all."""

    def close(self) -> None:
        """The chain is its runtime's."""


class ChainReader(ExitReader):
    """Asks exits and LM head of a chain, which come with their logits."""

    def __init__(self, adapter: Adapter, policy: ExitPolicy, depths: Sequence[int]) -> None:
        exits = adapter.exits if depths else None
        super().__init__(adapter.backbone, exits, policy, depths)
        shortlist = None if self._scorer is None else self._scorer.shortlist
        self._ids: list[int] | None = None if shortlist is None else shortlist.tolist()
        plain = SCORES.get(policy.score) is max_probability
        self._plain = plain and (exits is None or exits.score is None)

    def looks(self, asked: Sequence[Question | None]) -> Callable[[int, Any], bool]:
        return _always  # segments run their exits in any case

    def verdicts(
        self, depth: int, output: Any, asked: Sequence[Question | None]
    ) -> list[Verdict | Exception | None]:
        if not self._plain:
            return super().verdicts(depth, output.tensors, asked)
        made: list[Verdict | Exception | None] = []
        for place, question in enumerate(asked):
            if question is None:
                made.append(None)
            elif question.sampler.plain:
                made.append(self._verdict(depth, output, place, question))
            else:
                return super().verdicts(depth, output.tensors, asked)
        return made

    def _verdict(self, depth: int, output: ChainOutput, place: int, question: Question) -> Verdict:
        """Of the largest probability."""
        if depth in self._gates and not self._is_open(depth, output.entry[place]):
            return CLOSED
        logits = output.logits[place]
        largest = int(logits.argmax())
        token = largest if self._ids is None else self._ids[largest]
        if question.rule.thresholds.get(depth) == 0.0:
            return Verdict(token, math.nan)
        return Verdict(token, 1.0 / float(np.add.reduce(np.exp(logits - logits[largest]))))

    def _is_open(self, depth: int, entry: States) -> bool:
        gate, level = self._gates[depth]
        return bool(gate(torch.from_numpy(entry)[None]) >= level)

    def of_logits(self, logits: Any, asked: Sequence[Question]) -> list[int | Exception]:
        if all([question.sampler.plain for question in asked]):
            return [int(row.argmax()) for row in logits]
        return super().of_logits(torch.from_numpy(logits), asked)

    def full(self, final: Any, asked: Sequence[Question]) -> list[int | Exception]:
        """final: logits [n, V], as a chain ends with."""
        return self.of_logits(final, asked)

    def words(self, final: Any) -> Callable[[int, Question], int]:
        """final: as of `full`."""

        def word(place: int, question: Question) -> int:
            if question.sampler.plain:
                return int(final[place].argmax())
            row = torch.from_numpy(final[place : place + 1])
            return int(question.sampler.choose(row, question.before))

        return word


def _always(depth: int, entry: Tensor) -> bool:
    return True
