"""Keys and values of many rows, each at its own length: one preallocated tensor a layer.

A *slot* holds one row, a *column* one token of it. Every row writes at columns of its own, and
all layers share them: the shallow ones, the deep ones that lag behind, and the exits' own entries.
So rollback and eviction change integers that the caller keeps, and nothing is cropped or moved.
What stands after a row's last column is finite and masked.

Hugging Face's attention modules write and read through the cache's `update`, so stacks run
unmodified; what a call writes and reads is said by its `SlotCall`. Calls over several slots are

flat: every token is a row [N, 1]; keys are gathered for each. Any family.
packed: the tokens form one row [1, N], which is all that the linear layers see; only attention,
    which must be ours, sees those of a slot side by side [R, W], keys being read once for each.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, EncoderDecoderCache
from transformers.cache_utils import DynamicSlidingWindowLayer as SlidingLayer

from offramp.core.errors import UnsupportedBackboneError

BUCKET = 64
"""Columns are added by multiples of this."""


@dataclass(frozen=True, eq=False)
class SlotCall:
    """The slots and columns of the tokens of one call of the stack.

    shape: (B, T) of its hidden states [B, T, D].
    slots, columns: of each of its B * T tokens, in order.
    reads: slots whose keys are read, one for each row of queries [R]; None: the first R slots.
    queries: columns of the queries [R, W]; (R, W) is (B, T), but where calls are packed.
    width: columns that are read.
    gather: packed: the token at each of the R * W places; shorter rows repeat their last token.
    pick: packed: the place of each token.
    """

    shape: tuple[int, int]
    slots: Tensor
    columns: Tensor
    reads: Tensor | None
    queries: Tensor
    width: int
    gather: Tensor | None = None
    pick: Tensor | None = None

    beside = None
    """Slot and first column, where all tokens stand side by side in one slot (`OneSlot`)."""

    def as_wide_as(self, width: int) -> SlotCall:
        """Return the same call with `width` columns to read."""
        return replace(self, width=width)


class OneSlot:
    """A `SlotCall` over the columns of one slot from `first` up to, and without, `end`. Indices are
    made only when they are read."""

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

    def as_wide_as(self, width: int) -> OneSlot:
        """Return the same call with `width` columns to read."""
        (slot, first), new = self.beside, self.shape[1]
        return OneSlot(slot, first, first + new, self._device, width)


Call = SlotCall | OneSlot


class CurrentCall:
    """The current call of a runner, shared with its cache and with modules in its twins."""

    call: Any = None  # a `Call`; None: there is none


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values [slots, heads, columns, head_dim] of one layer; the first load allocates."""

    is_sliding = False

    def __init__(self, slots: int, columns: int, current: CurrentCall) -> None:
        # Not the base's, whose two attributes a layer of cross-attention computes.
        self.slots: int = slots
        self.current: CurrentCall = current
        self.columns: int = columns
        self.held: tuple[Tensor, ...] = ()
        self.is_initialized: bool = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Zeros, not empty memory: a NaN in a masked column would poison its row."""
        self.held = tuple(
            like.new_zeros(self.slots, like.shape[1], self.columns, like.shape[3])
            for like in (key_states, value_states)
        )
        self.is_initialized = True

    def load(self, slot: int, keys: Tensor, values: Tensor, start: int) -> None:
        """Write keys and values [1, H, T, Dh] of a prompt to `slot`, from column `start` on."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        for held, new in zip(self.held, (keys, values), strict=True):
            held[slot, :, start : start + new.shape[2]] = new[0]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values [B, H, T, Dh] at the current call's columns, and return the keys
        and values that its queries read [R, H, K, Dh].

        All are written before any is read, so a row may stand in the call several times.
        """
        call = self.current.call
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.held
        if call.beside is not None:  # no indices to look up
            (slot, first), new, end = call.beside, key_states.shape[2], call.width
            if self.slots > 1:
                keys, values = keys.narrow(0, slot, 1), values.narrow(0, slot, 1)
            keys.narrow(2, first, new).copy_(key_states)
            values.narrow(2, first, new).copy_(value_states)
            return keys.narrow(2, 0, end), values.narrow(2, 0, end)
        keys[call.slots, :, call.columns] = key_states.transpose(1, 2).flatten(0, 1)
        values[call.slots, :, call.columns] = value_states.transpose(1, 2).flatten(0, 1)
        return self.read(0), self.read(1)

    def read(self, part: int) -> Tensor:
        """Return the keys (0) or values (1) of the call's rows [R, H, K, Dh]."""
        held, call = self.held[part], self.current.call
        if call.beside is not None:
            return held.narrow(0, call.beside[0], 1).narrow(2, 0, call.width)
        if call.reads is None:  # a view: gathering costs as much as the attention
            return held[: len(call.queries), :, : call.width]
        return held[:, :, : call.width].index_select(0, call.reads)

    def grow(self, columns: int) -> None:
        """Make room for `columns` columns, more than now."""
        larger = []
        for held in self.held:
            larger.append(held.new_zeros(*held.shape[:2], columns, held.shape[3]))
            larger[-1][:, :, : held.shape[2]] = held
        self.held, self.columns = tuple(larger), columns

    def drop(self, columns: int) -> None:
        """Release keys and values; later ones are allocated with `columns` columns."""
        self.held, self.columns, self.is_initialized = (), columns, False

    def move(self, source: int, target: int, columns: int) -> None:
        """Copy a row of `columns` columns to another slot."""
        for held in self.held:
            held[target, :, :columns] = held[source, :, :columns]

    def get_seq_length(self) -> int:
        call = self.current.call
        return 0 if call is None else int(call.width)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length(), 0

    def get_max_length(self) -> int:
        return -1


class _CrossLayer(SlotLayer):  # type: ignore[no-untyped-call]
    """Keys and values of encoder states: attention reads the attributes, and writes only those of a
    layer that runs for the first time."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.load(self.current.call.beside[0], key_states, value_states, 0)
        return key_states, value_states

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        return self.read(0)

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        return self.read(1)


class _SlotView(Cache):
    """The cache as a stack sees it: its queries' offsets are a tensor, one for each query."""

    def __init__(self, layers: Sequence[SlotLayer]) -> None:
        super().__init__(layers=list(layers))
        self._first = layers[0]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._first.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._first.get_mask_sizes(query_length)

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Columns [R, W] of the queries, which the mask function takes for the scalar offset."""
        return self._first.current.call.queries


class SlotCache:
    """Keys and values of `slots` rows of at most `limit` tokens, or any number (None).

    entries: cache entries of the decoder's layers and of the exits. encoder: whether the model has
    one. current: the current call.
    """

    def __init__(self, slots: int, entries: int, limit: int | None, encoder: bool = False) -> None:
        self.slots: int = slots
        self.limit: int | None = limit
        columns = self._least = BUCKET if limit is None else min(BUCKET, rounded(limit + 1))
        self.current: CurrentCall = CurrentCall()
        self._across = CurrentCall()
        self.own: list[SlotLayer] = [
            SlotLayer(slots, columns, self.current) for _ in range(entries)
        ]
        self.cross: list[_CrossLayer] = [
            _CrossLayer(slots, 0, self._across) for _ in range(entries if encoder else 0)
        ]
        self.columns = columns
        self.encoder_columns = 0
        self.encoder_lengths: list[int] = [0] * slots
        self._seen: Any = _SlotView(self.own)
        if encoder:
            self._seen = EncoderDecoderCache(self._seen, _SlotView(self.cross))

    def load(
        self, slot: int, source: Any, row: int, real: Tensor | None, encoder: Tensor | None
    ) -> int:
        """Copy a row of a prompt from the cache of its run; return the number of its columns.

        Entries of layers that the prompt has yet to run have fewer columns, or none. real: which of
        the prompt's columns [T] are no padding; encoder: which of the encoder's [S]; None: all.

        Raises:
            UnsupportedBackboneError: layers that keep a state instead of keys and values.
        """
        own = getattr(source, "self_attention_cache", source)
        _check_entries(own.layers)
        length = max(int(entry.get_seq_length()) for entry in own.layers)
        # Taken to the host once: a device waits for the length of each mask.
        kept = None if real is None or bool(real.all()) else real.nonzero()[:, 0]
        places = [] if kept is None else kept.tolist()
        total = length if kept is None else len(places)
        self.reserve(total + 1)
        for mine, entry in zip(self.own, own.layers, strict=False):
            if not entry.is_initialized:
                continue
            end, held = int(entry.get_seq_length()), entry.keys.shape[2]
            start = end - held  # sliding layers hold the last columns alone
            keys, values = entry.keys[row : row + 1], entry.values[row : row + 1]
            if kept is not None:
                first = bisect_left(places, start)
                there = kept[first : bisect_left(places, end)] - start
                keys, values, start = keys[:, :, there], values[:, :, there], first
            mine.load(slot, keys, values, start)
        if self.cross:
            self._load_cross(slot, source.cross_attention_cache, row, encoder)
        return total

    def _load_cross(self, slot: int, source: Any, row: int, real: Tensor | None) -> None:
        made = [entry for entry in source.layers if entry.is_initialized]
        kept = None if real is None else real.nonzero()[:, 0]
        length = made[0].keys.shape[2] if kept is None else len(kept)
        if length > self.encoder_columns:
            self.encoder_columns = rounded(length)
            for mine in self.cross:
                mine.grow(self.encoder_columns)
        for mine, entry in zip(self.cross, source.layers, strict=False):
            if not entry.is_initialized:  # the prompt waits before it; a trial may run it even so
                if not mine.is_initialized:
                    mine.lazy_initialization(made[0].keys, made[0].values)
                continue
            keys, values = entry.keys[row : row + 1], entry.values[row : row + 1]
            if kept is not None:
                keys, values = keys[:, :, kept], values[:, :, kept]
            mine.load(slot, keys, values, 0)
        self.encoder_lengths[slot] = length

    def reserve(self, columns: int) -> None:
        """Make room for `columns` columns in every slot."""
        if columns <= self.columns:
            return
        self.columns = max(rounded(columns), self.columns * 3 // 2 // BUCKET * BUCKET)
        if self.limit is not None:
            self.columns = min(rounded(self.limit + 1), self.columns)
        for mine in self.own:
            mine.grow(self.columns)

    def move(self, source: int, target: int) -> None:
        """Copy a row to a free slot, so that the rows in use stand at the front."""
        for mine in self.own:
            mine.move(source, target, self.columns)
        for mine in self.cross:
            mine.move(source, target, self.encoder_lengths[source])
        self.encoder_lengths[target] = self.encoder_lengths[source]

    def drop(self) -> None:
        """Release all keys and values, with the memory for long ones."""
        self.columns, self.encoder_columns = self._least, 0
        self.encoder_lengths = [0] * self.slots
        for mine in self.own:
            mine.drop(self.columns)
        for mine in self.cross:
            mine.drop(0)
        self.release()

    def seen_by(self, call: Call, unread: Sequence[int] = ()) -> Any:
        """Return the cache that the stack gets for the current call. unread: layers that have yet
        to run over the encoder's states of the one slot in the call."""
        if self.cross:
            width = max(self.encoder_lengths)
            if call.beside is not None:
                width = self.encoder_lengths[call.beside[0]]
            self._across.call = call.as_wide_as(width)
            self._seen.is_updated = {i: i not in unread for i in range(len(self.cross))}
        return self._seen

    def release(self) -> None:
        """Forget the last call, and with it its tensors."""
        self.current.call = self._across.call = None

    @property
    def nbytes(self) -> int:
        """The allocated memory, in bytes."""
        return sum(held.nbytes for mine in (*self.own, *self.cross) for held in mine.held)


def _check_entries(entries: Sequence[Any]) -> None:
    wrong = {type(e).__name__ for e in entries if type(e) not in (DynamicLayer, SlidingLayer)}
    if wrong:
        raise UnsupportedBackboneError(
            f"The model keeps {', '.join(sorted(wrong))}, and not keys and values by token, as "
            "slots do.",
            "Answer its requests one by one: with generate, or `offramp serve --slots 1`.",
        )


def rounded(columns: int) -> int:
    return -(-columns // BUCKET) * BUCKET


# -- calls over several slots --------------------------------------------------------------------


def flat(
    slots: Sequence[int], columns: Sequence[int], width: int, device: torch.device
) -> SlotCall:
    """Return a call on tokens at `slots` and, ascending within each slot, at `columns`."""
    rows, at = torch.tensor([slots, columns], device=device)
    reads = None if [*slots] == [*range(len(slots))] else rows
    return SlotCall((len(rows), 1), rows, at, reads, at[:, None], width)


def packed(
    slots: Sequence[int], columns: Sequence[int], width: int, device: torch.device
) -> SlotCall:
    """Return a call on slots with different numbers of tokens, padded. Arguments as of `flat`."""
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
