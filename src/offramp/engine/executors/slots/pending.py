"""States that wait before a segment of the layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from offramp.engine.executors.slots.rows import SlotRow


class PendingStates:
    """States that layers below an exit made of columns that the layers above have yet to run, by
    segment and slot; a sequence's first one is of its column `base`."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._kept: dict[int, Tensor] = {}  # by segment [slots, columns, D]

    def note(
        self, segment: int, rows: Sequence[SlotRow], columns: Sequence[int], entries: Tensor
    ) -> None:
        """Keep one state of each slot that is to enter a segment. entries: [n, D]."""
        places = [column - row.base[segment] for row, column in zip(rows, columns, strict=True)]
        kept = self._room(segment, max(places) + 1, entries)
        if len(rows) == 1:
            kept.select(0, rows[0].slot).narrow(0, places[0], 1).copy_(entries)
        else:
            kept[[row.slot for row in rows], places] = entries

    def keep(self, segment: int, row: SlotRow, first: int, states: Tensor) -> None:
        """Keep states [n, D] of a slot's columns from `first` on that are to enter a segment."""
        if not len(states):
            return
        if segment not in self._kept or first <= row.base[segment]:
            row.base[segment] = first
        at = first - row.base[segment]
        kept = self._room(segment, at + len(states), states)
        kept[row.slot, at : at + len(states)] = states

    def of(self, segment: int, row: SlotRow, first: int, end: int) -> Tensor:
        """The states [n, D] of a slot's columns from `first` up to, and without, `end`."""
        base = row.base[segment]
        return self._kept[segment][row.slot, first - base : end - base]

    def move(self, source: int, slot: int) -> None:
        """Let a sequence's states move to another slot."""
        for kept in self._kept.values():
            kept[slot] = kept[source]

    def drop(self) -> None:
        """Forget all."""
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
