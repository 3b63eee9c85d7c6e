"""The chain of segments as an executor of the one decoder, in numpy.

Every sequence has cells of its own in llama.cpp, so what others do leaves its numbers as they are.
Where several go on, their tokens share calls: the weights are read once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from offramp.core.decoding.drafting import DraftBudget, Drafts, FeedOn
from offramp.core.decoding.executor import LoadedPrompt, Span
from offramp.core.decoding.reader import Decide
from offramp_llama_cpp.chain import SegmentChain
from offramp_llama_cpp.drafter import ChainDrafter
from offramp_llama_cpp.graphs import Array
from offramp_llama_cpp.native.drafts import FeedLoop
from offramp_llama_cpp.native.tap import States
from offramp_llama_cpp.prompt import Prompt


class ChainOutput(NamedTuple):
    """The output of an exit of the chain for n tokens, until its segment runs again. entry: the
    states that entered it [n, D]. logits: of what it can say [n, S]."""

    entry: States
    logits: Array


class ChainPrompt(NamedTuple):
    """A prompt that was run. slot: its sequence's. columns: its tokens. logits: of the first token
    [1, V]; None where the prompt waits. waits: the depth at whose exit the first token exited."""

    slot: int
    columns: int
    logits: Array | None
    waits: int | None


class ChainExecutor:
    """Runs a chain for as many sequences as it has slots, whose prompts it reads itself.

    stand: depths of the chain's exits. depths: of those in use. embed: the states [1, D] of a token
    at a position. exact: as of `SegmentChain.reset`. drafter: of answers whose drafts it writes.
    loop: feeds what the first exit says, where that is the chain's first; None: the decoder does.
    count: is told of each prompt how many tokens the slot still had of the prompt before, which are
    not run again, and how many are run; None: prompts are run whole.
    """

    rows: int | None = 1  # rows that have nothing to say do not go along
    positions: int | None = None
    opens = True

    def __init__(
        self,
        chain: SegmentChain,
        stand: Sequence[int],
        embed: Callable[[int, int], States],
        depths: Sequence[int],
        *,
        exact: bool,
        drafter: ChainDrafter | None = None,
        loop: FeedLoop | None = None,
        count: Callable[[int, int], None] | None = None,
    ) -> None:
        self.depths: tuple[int, ...] = tuple(depths)
        self.drafter: ChainDrafter | None = drafter
        self.free_rows: int | None = chain.sizes.free
        self._chain, self._stand, self._embed, self._exact = chain, tuple(stand), embed, exact
        self._last = len(chain.segments) - 1
        self._places = [self._stand.index(depth) for depth in depths]
        self._unused = [place for place in range(self._last) if place not in self._places]
        self._free = set(range(chain.slots))
        self.feed_on: FeedOn | None = None if loop is None else partial(self._feed_on, loop)
        self._opening: set[int] = set()  # slots whose prompt is to be verified with first drafts
        self._count = count

    def read(
        self,
        prepared: Prompt,
        *,
        use_exits: bool = True,
        decide: Decide | None = None,
        asks: frozenset[int] = frozenset(),
        keep: int | None = None,
        waits: bool = False,
        enters: bool = False,
    ) -> ChainPrompt:
        """Run a prompt in a free slot, to full depth or as far as `decide` lets it; before the
        first drafts it always waits."""

        def at(exit: int, state: Array, logits: Array) -> bool:
            assert decide is not None
            if self._stand[exit] not in asks:
                return False
            return decide(self._stand[exit], ChainOutput(state[None], logits[None]))

        chain, columns, slot = self._chain, len(prepared.states), min(self._free)
        kept = self._kept(prepared, slot, drafts=keep is not None)
        chain.reset(self._unused, exact=self._exact, prompt=prepared, slot=slot, kept=kept)
        new = prepared.states[kept:]
        self._opening.discard(slot)
        if self.drafter is not None:
            drafted = None if keep is None else prepared
            self.drafter.begin(slot, drafted, kept if drafted else 0)
        if keep is not None:
            self._below({slot: new})
            self._opening.add(slot)
            return ChainPrompt(slot, columns, None, None)
        place = chain.run(new, None if decide is None else at, slot)
        if place < self._last:
            return ChainPrompt(slot, columns, None, self._stand[place])
        return ChainPrompt(slot, columns, chain.finish(1, slot), None)

    def _kept(self, prompt: Prompt, slot: int, *, drafts: bool) -> int:
        """How many of a prompt's first tokens need not run again. drafts: whether the drafter must
        have run them too."""
        if self._count is None:
            return 0
        kept = self._chain.shared(prompt, self._unused, slot)
        if drafts and self.drafter is not None:  # which takes what comes through its exit
            came = self._chain.segments[self._stand.index(self.drafter.depth)].length_of(slot)
            kept = min(kept, came, self.drafter.shared(slot, prompt))
        self._count(kept, len(prompt.states) - kept)
        return kept

    def load(self, prompt: ChainPrompt, row: int) -> LoadedPrompt:
        columns, depths = prompt.columns, self.depths
        ran = len(depths) + 1
        if prompt.waits is not None:
            ran = depths.index(prompt.waits) + 1
        self._free.discard(prompt.slot)
        return LoadedPrompt(prompt.slot, columns, [columns] * ran + [0] * (len(depths) + 1 - ran))

    def feed(
        self,
        handles: Sequence[int],
        ids: Sequence[int],
        columns: Sequence[int],
        *,
        needs_exit: bool,
    ) -> ChainOutput:
        place, new = self._places[0], self._entering(handles, ids)
        if len(handles) == 1 and place == 0:
            return ChainOutput(*self._chain.advance(0, 1, new[handles[0]], handles[0]))
        made = self._through(0, place, dict.fromkeys(handles, 1), new)
        return _stacked([made[slot] for slot in handles])

    def _feed_on(
        self, loop: FeedLoop, handle: int, token: int, budget: DraftBudget
    ) -> list[tuple[int, ChainOutput]]:
        said, states, logits = self._chain.go_on(loop, token, budget, handle)
        outputs = (ChainOutput(states[i : i + 1], logits[i : i + 1]) for i in range(len(said)))
        return [*zip(said, outputs, strict=True)]

    def _entering(self, handles: Sequence[int], ids: Sequence[int]) -> dict[int, States]:
        """The states [1, D] of the next token of each."""
        tokens = self._chain.tokens
        return {
            slot: self._embed(token, tokens(slot)) for slot, token in zip(handles, ids, strict=True)
        }

    def _through(
        self,
        start: int,
        place: int,
        outputs: Mapping[int, int],
        new: Mapping[int, States] | None = None,
    ) -> Mapping[int, ChainOutput]:
        """Run what is pending from the chain's exit at `start` through the one at `place`; by slot.

        outputs: how many of the last tokens of each there will be logits of. new: states after
        what is pending at `start`.
        """
        for between in range(start, place):
            self._chain.together(between, dict.fromkeys(outputs, 0), new)
            new = None
        made = self._chain.together(place, outputs, new)
        return {slot: ChainOutput(*each) for slot, each in made.items()}

    def run(self, segment: int, spans: Sequence[Span], asked: Sequence[int]) -> ChainOutput | Array:
        outputs, picks, total = dict[int, int](), dict[int, list[int]](), 0
        for span in spans:
            start, total = total, total + span.end - span.first
            own = [column for column in asked if start <= column < total]
            # llama.cpp has logits of the last tokens.
            outputs[span.handle] = total - own[0] if own else 0
            picks[span.handle] = [column - own[0] for column in own]
        below = self._places[segment - 1]
        if segment == len(self.depths):
            made = self._through(below + 1, self._last, outputs)
            parts = [_picked(made[slot].logits, picks[slot]) for slot in outputs]
            return parts[0] if len(parts) == 1 else np.concatenate(parts)
        made = self._through(below + 1, self._places[segment], outputs)
        chosen = []
        for slot in outputs:
            entry, logits = made[slot]
            entry = entry[len(entry) - outputs[slot] :]
            chosen.append(ChainOutput(_picked(entry, picks[slot]), _picked(logits, picks[slot])))
        return _stacked(chosen)

    def full(self, handles: Sequence[int], ids: Sequence[int], columns: Sequence[int]) -> Array:
        new = self._entering(handles, ids)
        if len(handles) == 1 and self.drafter is None:
            slot = handles[0]
            self._chain.run(new[slot], None, slot)
            return self._chain.finish(1, slot)
        return self._whole(new, dict.fromkeys(handles, 1))

    def _whole(self, new: Mapping[int, States], outputs: Mapping[int, int]) -> Array:
        """Run new states of each slot through all segments, and what waits before the last one;
        logits of the last ones of each."""
        self._below(new)
        made = self._chain.together(self._last, outputs)
        parts = [made[slot][1] for slot in outputs]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _below(self, new: Mapping[int, States]) -> None:
        """Run new states of each slot up to the last segment. The drafter gets what enters its
        exit."""
        chain, drafter = self._chain, self.drafter
        for place in range(self._last if new else 0):
            made = chain.together(place, dict.fromkeys(new, 0), new if place == 0 else None)
            if drafter is not None and self._stand[place] == drafter.depth:
                for slot in new:
                    drafter.take(slot, made[slot][0])

    def draft(
        self,
        handles: Sequence[int],
        ids: Sequence[int | None],
        columns: Sequence[int],
        budgets: Sequence[DraftBudget],
    ) -> list[Drafts]:
        assert self.drafter is not None
        return [*map(self.drafter.draft, handles, ids, budgets)]

    def verify(
        self, handles: Sequence[int], ids: Sequence[Sequence[int]], columns: Sequence[int]
    ) -> Array:
        new = {
            slot: np.concatenate([self._embed(t, column + i) for i, t in enumerate(tokens)])
            for slot, tokens, column in zip(handles, ids, columns, strict=True)
            if tokens
        }
        opens, self._opening = self._opening, self._opening.difference(handles)
        outputs = {
            slot: len(tokens) + (slot in opens) for slot, tokens in zip(handles, ids, strict=True)
        }
        return self._whole(new, outputs)

    def allow_crops(self, handle: int) -> bool:
        return True

    def crop(self, handle: int, column: int) -> None:
        self._chain.crop(self._chain.tokens(handle) - column, handle)
        if self.drafter is not None:
            self.drafter.crop(handle, column)

    def release(self, handle: int) -> None:
        """Free the sequence's slot, which is reset when it is taken again."""
        self._free.add(handle)

    def close(self) -> None:
        """Do nothing: the runtime closes the chain."""


def _stacked(parts: Sequence[ChainOutput]) -> ChainOutput:
    if len(parts) == 1:
        return ChainOutput(*parts[0])
    return ChainOutput(
        np.concatenate([part.entry for part in parts]),
        np.concatenate([part.logits for part in parts]),
    )


def _picked(rows: Array, places: Sequence[int]) -> Array:
    return rows if len(places) == len(rows) else rows[places]
