"""The chain of segments as an executor of the one decoder, one answer at a time, in numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from offramp.engine.decoding.executor import Loaded, Span
from offramp.engine.decoding.reader import Decide, Looks, anyone
from offramp.runtimes.llama_cpp.chain import Array, SegmentChain
from offramp.runtimes.llama_cpp.native.tap import States


class ChainOutput(NamedTuple):
    """What an exit of the chain made of n tokens, until its segment runs again. entry: the states
    that entered it [n, D]. logits: of what it can say [n, S]."""

    entry: States
    logits: Array


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
        prepared: Any,
        *,
        use_exits: bool = True,
        decide: Decide | None = None,
        looks: Looks = anyone,
        keep: int | None = None,
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

    def allow_crops(self, handle: int) -> bool:
        return True

    def crop(self, handle: int, column: int) -> None:
        self._chain.crop(self._chain.tokens - column)

    def release(self, handle: int) -> None:
        """The next reset forgets all."""

    def close(self) -> None:
        """The chain is its runtime's."""
