"""Keys and values of one generation in preallocated buffers: a column for each token.

Every layer writes at the columns of the current call, whatever it has written before: layers that
early exits skipped may lag behind, and rollback changes the columns of the next call alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from offramp.engine.kv_cache import self_attention

ROOM = 64
"""Columns are added by multiples of this."""


class Columns:
    """What the current call writes: columns from `first` up to, and without, `end`."""

    __slots__ = ("end", "first")

    def __init__(self, first: int, end: int) -> None:
        self.first, self.end = first, end

    def start(self, window: int | None) -> int:
        """The first column that the call reads where attention reaches `window` tokens back."""
        return 0 if window is None else max(0, self.first - window + 1)


class LeanLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values [B, heads, columns, head_dim] of one layer, made when first written.

    window: of sliding attention. All columns are kept, and as many are read as Hugging Face's own
    layer would hand over.
    """

    is_croppable = True
    keys: Any
    values: Any

    def __init__(self, columns: Columns, window: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.columns, self.window = columns, window
        self.is_sliding = window is not None

    def take(self, entry: Any) -> None:
        """Move over what Hugging Face's entry holds, which may be the last columns alone."""
        if entry.is_initialized:
            end, held = entry.get_seq_length(), entry.keys.shape[2]
            self._grow(entry.keys, entry.values, end)
            self.keys[:, :, end - held : end] = entry.keys
            self.values[:, :, end - held : end] = entry.values
        entry.reset()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._grow(key_states, value_states, self.columns.end)

    def _grow(self, keys: Tensor, values: Tensor, columns: int) -> None:
        """Make room for `columns` and some more, of rows and heads as those of `keys`, `values`."""
        old = 0 if self.keys is None else self.keys.shape[2]
        room = -(-max(columns + ROOM, old * 3 // 2) // ROOM) * ROOM

        def larger(held: Tensor | None, like: Tensor) -> Tensor:
            made = like.new_zeros(*like.shape[:2], room, like.shape[3])
            if held is not None:
                made[:, :, :old] = held
            return made

        self.keys, self.values = larger(self.keys, keys), larger(self.values, values)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        columns = self.columns
        first, end = columns.first, columns.end
        if self.keys is None or self.keys.shape[2] < end:
            self._grow(key_states, value_states, end)
        keys, values, new = self.keys, self.values, end - first
        keys.narrow(2, first, new).copy_(key_states)
        values.narrow(2, first, new).copy_(value_states)
        start = columns.start(self.window)
        return keys.narrow(2, start, end - start), values.narrow(2, start, end - start)

    def get_seq_length(self) -> int:
        return self.columns.first

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        start = self.columns.start(self.window)
        return self.columns.first - start + query_length, start

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing: what lies behind the columns of the next call is not read."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            self.keys = self.keys.index_select(0, beam_idx)
            self.values = self.values.index_select(0, beam_idx)


class LeanCache(Cache):
    """The layers' entries, and those of exits behind them; all write at the same columns."""

    layers: Any

    def __init__(self, layers: list[LeanLayer], columns: Columns) -> None:
        super().__init__(layers=[*layers])
        self.columns = columns

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        return self.layers[layer_idx].update(key_states, value_states)  # type: ignore[no-any-return]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns.first


def like(cache: Any, tokens: int, *, windows: bool = True) -> LeanCache | None:
    """An empty cache with the entries of `cache`; None where some hold more than keys and values.

    tokens: how many have been read. windows: whether sliding attention reads its window alone.
    """
    entries = self_attention(cache).layers
    if any(type(entry) not in (DynamicLayer, DynamicSlidingWindowLayer) for entry in entries):
        return None
    columns = Columns(tokens, tokens)
    reach = [getattr(entry, "sliding_window", None) if windows else None for entry in entries]
    return LeanCache([LeanLayer(columns, window) for window in reach], columns)


def beside_encoder(own: LeanCache, cache: Any) -> Any:
    """`own` with the part of `cache` for an encoder's keys, where it has one."""
    if self_attention(cache) is cache:
        return own
    both = EncoderDecoderCache(own, cache.cross_attention_cache)
    both.is_updated = cache.is_updated
    return both


def move(cache: Any, own: LeanCache) -> None:
    """Take the keys and values of the decoder's own tokens out of `cache`."""
    for mine, entry in zip(own.layers, self_attention(cache).layers, strict=True):
        mine.take(entry)
