"""The executor of models that keep keys and values: many sequences in slots of one cache.

Calls over one slot are calls on contiguous columns; calls over several write and read by index, the
tokens of each slot at columns of their own. `running` makes a call, `rows` knows the sequences,
their positions and the states that wait for deeper layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from offramp.core.decoding.drafting import DraftBudget, Drafts
from offramp.core.decoding.executor import LoadedPrompt, Span
from offramp.core.executors.prompt import Prompt
from offramp.core.executors.segments import ExitOutput, Output, in_one_copy, joined, picked
from offramp.core.executors.slots.cache import Call, OneSlot, flat, packed
from offramp.core.executors.slots.rows import PendingStates, SlotRow, SlotRows
from offramp.core.executors.slots.running import SlotRunner
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import ExitSet


class SlotExecutor(SlotRunner):
    """Runs a backbone with exits on the rows of a slot cache; arguments as of `SlotRunner`."""

    rows: int | None = None
    opens = True

    def __init__(
        self,
        backbone: Backbone,
        exits: ExitSet | None,
        depths: Sequence[int],
        *,
        slots: int = 1,
        **more: Any,
    ) -> None:
        super().__init__(backbone, exits, depths, slots=slots, **more)
        self._pending = PendingStates(slots)

    # -- sequences ---------------------------------------------------------------------------

    def load(self, prompt: Prompt, row: int) -> LoadedPrompt:
        """Put a row of a prompt into a free slot.

        Raises:
            UnsupportedBackboneError: layers that keep a state instead of keys and values.
        """
        slot = len(self.held.by_slot)
        real = None if prompt.real is None else prompt.real[row]
        states, mask = prompt.encoder or (None, None)
        encoder = None if mask is None else mask[row].bool()
        if encoder is not None and bool(encoder.all()):
            encoder = None
        columns = self.cache.load(slot, prompt.cache, row, real, encoder)
        if prompt.waits is not None and not prompt.waits[0]:
            columns = prompt.columns if real is None else int(real.sum())
        held = SlotRow(slot, dict.fromkeys(range(len(self._segments)), columns))
        self.held.place(held, prompt, row, columns)
        ran = [columns] * len(self._segments)
        if prompt.waits is not None:
            depth, waiting = prompt.waits
            segment = self.depths.index(depth) + 1 if depth else 0
            mine = waiting[row]
            if real is not None and not bool(real.all()):
                mine = mine[real[-len(mine) :]]
            self._pending.keep(segment, held, columns - len(mine), mine)
            ran[segment:] = [columns - len(mine)] * (len(ran) - segment)
            if states is not None:
                mine = states[row : row + 1]
                held.encoder = mine if encoder is None else mine[:, encoder]
                above = self._segments[segment:]
                held.unread = {entry for running in above for entry in self._entries(running)}
        if prompt.kept is not None:
            held.verified = columns - 1, prompt.kept[row : row + 1]
        self.held.by_slot.append(held)
        return LoadedPrompt(held, columns, ran)

    def release(self, handle: SlotRow) -> None:
        """Free a slot; the last sequence moves there, so that slots in use stand in front."""
        moved = self.held.remove(handle)
        if moved is not None:
            self.cache.move(*moved)
            self._pending.move(*moved)

    def allow_crops(self, handle: SlotRow) -> bool:
        return True

    def crop(self, handle: SlotRow, column: int) -> None:
        for segment, base in handle.base.items():
            handle.base[segment] = min(base, column)

    def close(self) -> None:
        """Drop keys, values and states now; the garbage collector would find them late."""
        self.cache.drop()
        self._pending.drop()
        self.held = SlotRows(self.cache.slots)

    # -- calls -------------------------------------------------------------------------------

    def feed(
        self,
        handles: Sequence[SlotRow],
        ids: Sequence[int],
        columns: Sequence[int],
        *,
        needs_exit: bool,
    ) -> ExitOutput:
        call = self._one_each(handles, columns)
        output = self.run_layers(self._segments[0], call, self._ids(ids), needs_exit=needs_exit)
        assert isinstance(output, ExitOutput)
        self._pending.note(1, handles, columns, output.entry)
        return output

    def full(
        self, handles: Sequence[SlotRow], ids: Sequence[int], columns: Sequence[int]
    ) -> Tensor:
        call = self._one_each(handles, columns)
        final = self._call(range(self.backbone.depth), call, self._ids(ids))
        for row, column in zip(handles, columns, strict=True):
            row.base = dict.fromkeys(row.base, column + 1)
        return final

    def run(self, segment: int, spans: Sequence[Span], asked: Sequence[int]) -> Output:
        needs_exit = len(asked) > 0
        running = self._segments[segment]
        states = [self._pending.of(segment, row, start, end) for row, start, end in spans]
        alone = [row.places is not None or row.encoder is not None for row, _, _ in spans]
        if len(spans) == 1 or any(alone):
            made = [
                self.run_layers(running, self._beside(span), state[None], needs_exit=needs_exit)
                for span, state in zip(spans, states, strict=True)
            ]
            output = joined(made)
        else:
            output = self._several(
                spans,
                states,
                lambda call, laid: self.run_layers(running, call, laid, needs_exit=needs_exit),
            )
        at = 0
        for row, start, end in spans:
            row.base[segment] = end
            self._read(row, segment)
            if isinstance(output, ExitOutput):
                self._pending.keep(segment + 1, row, start, output.entry[at : at + end - start])
                at += end - start
        total = sum(span.end - span.first for span in spans)
        if len(asked) == total:
            return output
        first, end = (asked[0], asked[-1] + 1) if asked else (0, 0)
        if end - first == len(asked):  # an index would have to be taken to the device
            return picked(output, slice(first, end))
        return picked(output, torch.tensor(asked, dtype=torch.long, device=self._device))

    def _read(self, row: SlotRow, segment: int) -> None:
        """Note that a segment has run what waited of a row: of a prompt, with the encoder's
        states."""
        row.unread.difference_update(self._entries(self._segments[segment]))
        if self.backbone.depth - 1 not in row.unread:
            row.unread, row.encoder = set(), None
        if segment == len(self._segments) - 1:
            row.places = None

    # -- drafts ------------------------------------------------------------------------------

    def draft(
        self,
        handles: Sequence[SlotRow],
        ids: Sequence[int | None],
        columns: Sequence[int],
        budgets: Sequence[DraftBudget],
    ) -> list[Drafts]:
        drafts = [*map(Drafts, budgets)]
        if self._drafter is None:
            return drafts
        places, begin = [], []
        for place, (row, column) in enumerate(zip(handles, columns, strict=True)):
            first, made = row.verified or (column, ())
            if budgets[place].max_drafts and 0 <= column - 1 - first < len(made):
                places.append(place)
                begin.append(made[column - 1 - first])
                row.verified = column - 1, begin[-1][None]
        if not places:
            return drafts
        # All go as far as the one that goes farthest: what is too much is not looked at, and
        # written over what no draft has reached yet.
        last = (self.cache.limit or max(columns) + max(b.max_drafts for b in budgets)) - 1
        going, step, rows = set(places), 0, [handles[place] for place in places]
        states, said = torch.stack(begin), [0] * len(places)
        if any(ids[place] is None for place in places):  # a prompt that waits: its state says more
            largest, shares = in_one_copy(*self._drafter.tokens(states))
            said = [*map(int, largest)]
            for place, token, share in zip(places, said, shares, strict=True):
                if ids[place] is None and not drafts[place].add(token, share):
                    going.remove(place)
        newest = (ids[place] for place in places)
        tokens = self._ids([n if own is None else own for n, own in zip(said, newest, strict=True)])
        while going:
            ahead = [min(columns[place] + step, last) for place in places]
            states = self._drafted(rows, ahead, self._drafter.inputs(tokens, states))
            (tokens, drafted), step = self._drafter.tokens(states), step + 1
            for place, token, share in zip(places, *in_one_copy(tokens, drafted), strict=True):
                if place in going and not drafts[place].add(int(token), share):
                    going.remove(place)
        return drafts

    def _drafted(self, rows: Sequence[SlotRow], columns: Sequence[int], inputs: Tensor) -> Tensor:
        """What the drafting exit makes [n, D] of a column of each slot."""
        assert self._drafter is not None
        depth, call = self._drafter.depth, self._one_each(rows, columns)
        output = self.run_layers(range(depth, depth), call, inputs.view(*call.shape, -1))
        assert isinstance(output, ExitOutput) and output.state is not None
        return output.state

    def verify(
        self, handles: Sequence[SlotRow], ids: Sequence[Sequence[int]], columns: Sequence[int]
    ) -> Tensor:
        new = [
            (Span(row, column, column + len(own)), self._ids(own))
            for row, own, column in zip(handles, ids, columns, strict=True)
            if own
        ]
        if self._drafter is None:  # whoever drafts reads no states of an exit
            return self._together(range(self.backbone.depth), new)  # type: ignore[return-value]
        depth = self._drafter.depth
        segment, last = self.depths.index(depth) + 1, len(self.depths)
        if new:
            made: Any = self._together(range(depth), new)
            sizes = [len(own) for _, own in new]
            parts = zip(torch.split(made.entry, sizes), torch.split(made.state, sizes), strict=True)
            for ((row, first, _), _), (entry, state) in zip(new, parts, strict=True):
                self._pending.keep(segment, row, first, entry)
                start, before = row.verified or (first, state[:0])
                row.verified = start, torch.cat([before[: first - start], state])
        spans, asked, count = list[Span](), list[int](), 0
        for row, own, column in zip(handles, ids, columns, strict=True):
            first, end = row.base[segment], column + len(own)  # with a prompt that waits
            spans.append(Span(row, first, end))
            count += end - first
            asked.extend(range(count - len(own) - (first < column), count))
        for running in range(segment, last):
            self.run(running, spans, ())
        return self.run(last, spans, asked)  # type: ignore[return-value]

    def _together(self, running: range, new: Sequence[tuple[Span, Tensor]]) -> Output:
        """What layers and the exit after them make of ids [n] at columns of each slot."""
        if len(new) == 1:
            [(span, own)] = new
            return self.run_layers(running, self._beside(span), own[None])
        spans, ids = zip(*new, strict=True)
        return self._several(spans, ids, lambda call, laid: self.run_layers(running, call, laid))

    # -- layouts -----------------------------------------------------------------------------

    def _ids(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, device=self._device)

    def _beside(self, span: Span) -> OneSlot:
        self.cache.reserve(span.end)
        return OneSlot(span.handle.slot, span.first, span.end, self._device)

    def _one_each(self, rows: Sequence[SlotRow], columns: Sequence[int]) -> Call:
        """One token of each slot."""
        width = max(columns) + 1
        self.cache.reserve(width)
        if len(rows) == 1:
            return OneSlot(rows[0].slot, columns[0], width, self._device)
        return flat([row.slot for row in rows], columns, width, self._device)

    def _several(
        self, spans: Sequence[Span], inputs: Sequence[Tensor], run: Callable[[Call, Tensor], Output]
    ) -> Output:
        """What `run` makes of columns of several slots in one call. inputs: each slot's, ids [n] or
        states [n, D]."""
        spelt = [(row.slot, c) for row, first, end in spans for c in range(first, end)]
        named, columns = [slot for slot, _ in spelt], [column for _, column in spelt]
        width = max(columns) + 1
        self.cache.reserve(width)
        call = (packed if self.packs else flat)(named, columns, width, self._device)
        laid = torch.cat([*inputs])
        return run(call, laid.view(*call.shape, *laid.shape[1:]))
