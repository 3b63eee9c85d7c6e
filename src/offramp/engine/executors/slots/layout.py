"""How the tokens of one call are laid out for the stack, and for its attention.

flat: every token is a row [N, 1]; keys are gathered for each. Any family.
packed: the tokens form one row [1, N], which is all that the linear layers see; only attention,
    which must be ours, sees those of a slot side by side [R, W], keys being read once for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SlotCall:
    """The slots and columns of the tokens of one call of the stack.

    shape: (B, T) of its hidden states [B, T, D].
    slots, columns: of each of its B * T tokens, in order.
    reads: slots whose keys are read, one for each row of queries [R]; None: the first R slots.
    queries: columns of the queries [R, W]; (R, W) is (B, T), but where calls are packed.
    width: how many columns are read.
    gather: packed, for each of the R * W places the token that stands there: of shorter rows the
    last once more. pick: for each token its place.
    """

    shape: tuple[int, int]
    slots: Tensor
    columns: Tensor
    reads: Tensor | None
    queries: Tensor
    width: int
    gather: Tensor | None = None
    pick: Tensor | None = None

    @cached_property
    def places(self) -> list[tuple[int, int, int]]:
        """Return of each token the row of queries and the place in it, and its column."""
        wide = self.queries.shape[1]
        picked = range(len(self.columns)) if self.pick is None else self.pick.tolist()
        columns = self.columns.tolist()
        return [(at // wide, at % wide, c) for at, c in zip(picked, columns, strict=True)]

    beside = None
    """Slot and first column, where all tokens stand side by side in one slot (`OneSlot`)."""

    def as_wide_as(self, width: int) -> SlotCall:
        """The same, reading another number of columns."""
        return replace(self, width=width)


class OneSlot:
    """A `SlotCall` over the columns of one slot from `first` up to, and without, `end`. Indices are
    made only where somebody asks."""

    gather = pick = reads = None

    def __init__(
        self, slot: int, first: int, end: int, device: torch.device, width: int | None = None
    ) -> None:
        self.beside: tuple[int, int] = slot, first
        self.shape: tuple[int, int] = (1, end - first)
        self.width: int = end if width is None else width
        self._device = device

    @cached_property
    def columns(self) -> Tensor:
        first = self.beside[1]
        return torch.arange(first, first + self.shape[1], device=self._device)

    @cached_property
    def slots(self) -> Tensor:
        return torch.full((self.shape[1],), self.beside[0], device=self._device)

    @property
    def queries(self) -> Tensor:
        return self.columns[None]

    @cached_property
    def places(self) -> list[tuple[int, int, int]]:
        first = self.beside[1]
        return [(0, place, first + place) for place in range(self.shape[1])]

    def as_wide_as(self, width: int) -> OneSlot:
        """The same, reading another number of columns."""
        (slot, first), new = self.beside, self.shape[1]
        return OneSlot(slot, first, first + new, self._device, width)


Call = SlotCall | OneSlot


class CurrentCall:
    """The call that is under way, which a runner shares with its cache and modules in its twins."""

    call: Any = None  # a `Call`; None: there is none


def flat(
    slots: Sequence[int], columns: Sequence[int], width: int, device: torch.device
) -> SlotCall:
    """A call on one token of each slot, or on tokens that stand slot by slot, several of a slot in
    ascending columns."""
    rows, at = torch.tensor([slots, columns], device=device)
    reads = None if [*slots] == [*range(len(slots))] else rows
    return SlotCall((len(rows), 1), rows, at, reads, at[:, None], width)


def packed(
    slots: Sequence[int], columns: Sequence[int], width: int, device: torch.device
) -> SlotCall:
    """The same."""
    rows, at = torch.tensor([slots, columns], device=device)
    starts = [i for i, slot in enumerate(slots) if i == 0 or slot != slots[i - 1]]
    ends = [*starts[1:], len(slots)]
    longest = max(end - start for start, end in zip(starts, ends, strict=True))
    gather = torch.tensor(
        [
            [min(start + w, end - 1) for w in range(longest)]
            for start, end in zip(starts, ends, strict=True)
        ],
        device=device,
    )
    pick = torch.tensor(
        [
            row * longest + place - start
            for row, (start, end) in enumerate(zip(starts, ends, strict=True))
            for place in range(start, end)
        ],
        device=device,
    )
    reads = [slots[start] for start in starts]
    front = reads == list(range(len(reads)))
    read = None if front else torch.tensor(reads, device=device)
    shape = (1, len(slots))
    return SlotCall(shape, rows, at, read, at[gather], width, gather.flatten(), pick)
