"""The sequences of an executor, each in a slot: the positions of their columns, and the states that
wait before a segment of the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from offramp.core.executors.prompt import Prompt
from offramp.core.executors.slots.cache import Call


@dataclass(eq=False)
class SlotRow:
    """One sequence in a slot of the cache.

    base: by segment, the column of the first state that is kept before it. offset: position of
    column 0. first: the same on the first of several axes. places: positions [..., T] of a waiting
    prompt whose positions do not count up by one.
    encoder: states [1, S, D] of an encoder. unread: layers that have yet to read these. verified: a
    column, and the drafting exit's states [n, D] from that column on.
    """

    slot: int
    base: dict[int, int]
    offset: int = 0
    first: int = 0
    places: Tensor | None = None
    encoder: Tensor | None = None
    unread: set[int] = field(default_factory=set)
    verified: tuple[int, Tensor] | None = None


class SlotRows:
    """The sequences by slot, those in use at the front.

    offsets: position of column 0 [..., slots]; None: the stack takes none. ahead: positions before
    the first column, at most. uneven: whether some sequence counts differently on each axis, so
    that tables of one number a token do not apply.
    """

    def __init__(self, slots: int) -> None:
        self.by_slot: list[SlotRow] = []
        self.offsets: Tensor | None = None
        self.ahead, self.uneven, self._slots = 0, False, slots

    def place(self, held: SlotRow, prompt: Prompt, row: int, columns: int) -> None:
        """Store the positions of a prompt, where the stack takes any."""
        positions = prompt.positions
        if positions is None:
            return
        own = positions[..., row if positions.shape[-2] > 1 else 0, :]  # [..., T]
        if prompt.real is not None and own.shape[-1] == prompt.real.shape[1]:
            own = own[..., prompt.real[row]]
        offset = own[..., -1] + 1 - columns
        if self.offsets is None:
            self.offsets = offset.new_zeros(*offset.shape, self._slots)
        self.offsets[..., held.slot] = offset
        every = offset.flatten().tolist()
        axes = every[-3:]
        self.uneven = self.uneven or len({*axes}) > 1
        held.offset, held.first = every[-1], every[0]
        self.ahead = max(self.ahead, axes[-1])
        if prompt.waits is not None:
            plain = torch.arange(columns, device=own.device) + offset[..., None]
            before = columns - own.shape[-1]  # of an earlier prompt; they wait nowhere
            if not torch.equal(plain[..., before:].expand_as(own), own):
                held.places = torch.cat([plain[..., :before], own], -1)

    def remove(self, handle: SlotRow) -> tuple[int, int] | None:
        """Free a slot; the last sequence moves there. Returns its old and new slot, None if no
        sequence moved."""
        last = self.by_slot.pop()
        if last is handle:
            return None
        source, slot = last.slot, handle.slot
        self.by_slot[slot], last.slot = last, slot
        if self.offsets is not None:
            self.offsets[..., slot] = self.offsets[..., source]
        return source, slot

    def at_front(self, call: Call) -> tuple[int | None, int]:
        """Return the position of column 0 of a call on one slot, and that on the first axis; 0 for
        other calls. None: the prompt has positions of its own."""
        if call.beside is None:
            return 0, 0
        row, start = self.by_slot[call.beside[0]], call.beside[1]
        if row.places is not None and start < row.places.shape[-1]:
            return None, row.first
        return row.offset if self.offsets is not None else 0, row.first

    def with_own(self, positions: Tensor, call: Call) -> Tensor:
        """Return positions [..., T] of a call on one slot, the prompt's own where it has any."""
        assert call.beside is not None
        row, start = self.by_slot[call.beside[0]], call.beside[1]
        assert row.places is not None
        own = row.places[..., start : start + call.shape[1]]
        positions = positions.clone()
        positions[..., 0, : own.shape[-1]] = own
        return positions


class PendingStates:
    """States below an exit at columns that the layers above have yet to run, by segment and slot; a
    sequence's first state is at column `base`."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._kept: dict[int, Tensor] = {}  # by segment [slots, columns, D]

    def note(
        self, segment: int, rows: Sequence[SlotRow], columns: Sequence[int], entries: Tensor
    ) -> None:
        """Keep one state of each slot, at the entry of a segment. entries: [n, D]."""
        places = [column - row.base[segment] for row, column in zip(rows, columns, strict=True)]
        kept = self._room(segment, max(places) + 1, entries)
        if len(rows) == 1:
            kept.select(0, rows[0].slot).narrow(0, places[0], 1).copy_(entries)
        else:
            kept[[row.slot for row in rows], places] = entries

    def keep(self, segment: int, row: SlotRow, first: int, states: Tensor) -> None:
        """Keep states [n, D] of a slot's columns from `first` on, at the entry of a segment."""
        if not len(states):
            return
        if segment not in self._kept or first <= row.base[segment]:
            row.base[segment] = first
        at = first - row.base[segment]
        kept = self._room(segment, at + len(states), states)
        kept[row.slot, at : at + len(states)] = states

    def of(self, segment: int, row: SlotRow, first: int, end: int) -> Tensor:
        """Return the states [n, D] of a slot's columns from `first` up to, and without, `end`."""
        base = row.base[segment]
        return self._kept[segment][row.slot, first - base : end - base]

    def move(self, source: int, slot: int) -> None:
        """Move a sequence's states to another slot."""
        for kept in self._kept.values():
            kept[slot] = kept[source]

    def drop(self) -> None:
        """Forget the states of all slots."""
        self._kept = {}

    def _room(self, segment: int, columns: int, like: Tensor) -> Tensor:
        """What is kept before a segment, with room for so many columns of a slot."""
        kept = self._kept.get(segment)
        if kept is None or kept.shape[1] < columns:
            larger = like.new_zeros(self._slots, max(64, 2 * columns), like.shape[-1])
            if kept is not None:
                larger[:, : kept.shape[1]] = kept
            kept = self._kept[segment] = larger
        return kept
