"""Programs as the executor of the one decoder, one answer at a time.

The next token is begun with the exit's token before it is known whether the exit was confident, so
that the device does not wait for the CPU. Where it was not, what was begun is void: its keys,
values and state are overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from offramp_llama_cpp.prompt import check_context

from offramp.core.decoding.executor import Handle, LoadedPrompt, Span
from offramp.core.decoding.reader import Query, Word
from offramp.core.decoding.rule import ExitVerdict
from offramp.core.decoding.sequence import NAN
from offramp.core.engine.heads import ExitHeads
from offramp.core.executors.prompt import Prompt
from offramp.core.executors.segments import Output, joined, picked
from offramp_lab.graphs.programs import FULL, MOST, Read, RowPrograms, Said


class GraphOutput(NamedTuple):
    """The tokens that programs say after n tokens; and what they made of them, where somebody reads
    it."""

    said: Said
    states: Any


class Ahead(NamedTuple):
    """A token whose program is running: its id, its column, and the coming result."""

    token: int | None
    segment: int
    column: int
    read: Read


class GraphExecutor:
    """Runs programs for one sequence at a time.

    plain: whether what the programs say is all that is asked for, so that the next token may be
    begun ahead.
    """

    rows: int | None = 1
    positions: int | None = None
    free_rows: int | None = None
    opens = False
    feed_on = None

    def __init__(self, programs: RowPrograms) -> None:
        self.depths: tuple[int, ...] = programs.depths
        self._programs = programs
        self._handle: Handle = None
        self._prompt = 0  # columns
        self._aim: tuple[int, int] | None = None  # what is fed next, if nothing else is said
        self._ahead: Ahead | None = None
        self.plain = True

    # -- sequences -------------------------------------------------------------------------------

    def load(self, prompt: Prompt, row: int) -> LoadedPrompt:
        """Take over a prompt.

        Raises:
            InputError: with its answer it is longer than there are columns.
        """
        loaded = self._programs.slots.load(prompt, row)
        self._handle, self._prompt = loaded.handle, loaded.columns
        self._aim = self._ahead = None
        limit = self._programs.limit
        check_context(loaded.columns, prompt.prepared.most, limit, unread=0)
        return loaded

    def release(self, handle: Handle) -> None:
        self.close()

    def close(self) -> None:
        """Free the row, if there is one."""
        if self._handle is not None:
            self._programs.slots.release(self._handle)
        self._handle = self._ahead = None

    def allow_crops(self, handle: Handle) -> bool:
        return True

    def crop(self, handle: Handle, column: int) -> None:
        self._ahead = self._aim = None
        self._programs.slots.crop(handle, column)

    # -- calls -----------------------------------------------------------------------------------

    def feed(
        self,
        handles: Sequence[Handle],
        ids: Sequence[int],
        columns: Sequence[int],
        *,
        needs_exit: bool,
    ) -> GraphOutput:
        return self._step(0, ids[0], columns[0])

    def full(
        self, handles: Sequence[Handle], ids: Sequence[int], columns: Sequence[int]
    ) -> GraphOutput:
        return self._step(FULL, ids[0], columns[0])

    def verify(
        self, handles: Sequence[Handle], ids: Sequence[Sequence[int]], columns: Sequence[int]
    ) -> GraphOutput:
        """Run tokens side by side, without a program."""
        self._ahead = self._aim = None
        return GraphOutput(Said([], []), self._programs.slots.verify(handles, ids, columns))

    def _step(self, segment: int, token: int, column: int) -> GraphOutput:
        """Feed a token, unless it was begun, and begin the one that it says."""
        programs, ahead, self._ahead = self._programs, self._ahead, None
        if ahead is not None and ahead[:3] == (token, segment, column):
            read = ahead.read
        else:
            if self._aim != (token, column) or ahead is not None:
                programs.aim(token, column)
            read = programs.feed(segment, column)
        begun = None
        if self.plain and column + 1 < programs.limit:
            begun = programs.feed(segment, column + 1)
        said = read()
        self._aim = said.tokens[0], column + 1
        if begun is not None:
            self._ahead = Ahead(said.tokens[0], segment, column + 1, begun)
        states = None if self.plain else programs.states(segment, column, column + 1)
        return GraphOutput(said, states)

    def run(self, segment: int, spans: Sequence[Span], asked: Sequence[int]) -> GraphOutput:
        (handle, first, end), programs = spans[0], self._programs
        self._ahead = self._aim = None
        if first < self._prompt:  # it waited; as long as it is, no program is made for it
            waited = Span(handle, first, min(end, self._prompt))
            programs.slots.run(segment, [waited], ())
        tokens, scores, states = [], [], list[Output]()
        for start in range(max(first, self._prompt), end, MOST):
            stop = min(end, start + MOST)
            read = programs.deep(segment, start, stop)
            rows = [first + place - start for place in asked if start <= first + place < stop]
            if not rows:
                continue
            said = read()
            tokens += [said.tokens[row] for row in rows]
            scores += [said.scores[row] for row in rows]
            if not self.plain:
                made = programs.states(segment, start, stop)  # which is written again
                states.append(picked(made, torch.tensor(rows, device=programs.backbone.device)))
            if segment == len(self.depths):
                self._aim = said.tokens[-1], stop
        return GraphOutput(Said(tokens, scores), joined(states) if states else None)


class GraphHeads(ExitHeads):
    """Asks exits and LM head of programs, which say themselves what is plainly asked for."""

    def verdicts(
        self, depth: int, output: Any, queries: Sequence[Query | None]
    ) -> list[ExitVerdict | Exception | None]:
        if isinstance(output, GraphOutput):
            if output.states is None:
                return [
                    None
                    if query is None
                    else ExitVerdict(token, score if query.rule.scored(depth) else NAN)
                    for query, token, score in zip(queries, *output.said, strict=True)
                ]
            output = output.states
        return super().verdicts(depth, output, queries)

    def words(self, final: GraphOutput) -> Word:  # type: ignore[override]
        if final.states is None:
            return lambda place, query: final.said.tokens[place]
        return super().words(final.states)
