"""What a stack hands to its layers, for many columns at once, and its slices for a few of them.

Sliced by the arguments' names, never by their shapes: a rotary table as wide as the cache is long
looks like a mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offramp.engine.kv_cache import CACHE_NAMES
from offramp.models.backbone import LayerCall


class CannotRehearseError(Exception):
    """Something about this model or request is not known here: its stack must run itself."""


@dataclass(frozen=True)
class Span:
    """Where a call stands in a table: rows from `row`, `new` of them, and columns `start` to `end`.

    first: column of the first new token.
    """

    row: int
    new: int
    start: int
    end: int
    first: int


def _last(table: Tensor, at: Span) -> Tensor:
    return table.narrow(-1, at.row, at.new)


def _rows(table: Tensor, at: Span) -> Tensor:
    return table.narrow(-2, at.row, at.new)


def _rows_and_columns(table: Tensor, at: Span) -> Tensor:
    return table.narrow(-2, at.row, at.new).narrow(-1, at.start, at.end - at.start)


def _pair(tables: tuple[Tensor, ...], at: Span) -> tuple[Tensor, ...]:
    return tuple(_rows(table, at) for table in tables)


def _alike(table: Tensor, at: Span) -> Tensor:
    """Rows that do not depend on the token."""
    return table.narrow(-2, 0, min(at.new, table.shape[-2]))


def _whole(table: Tensor, at: Span) -> Tensor:
    return table


CUTS: dict[str, Callable[[Any, Span], Any]] = {
    "encoder_attention_mask": _alike,
    "encoder_decoder_position_bias": _whole,
    "encoder_hidden_states": _whole,
    "position_bias": _rows_and_columns,
    "position_embeddings": _pair,
    "position_ids": _last,
}
"""How the slice of an argument for a few tokens is cut out of the one for many; masks aside."""


@dataclass(frozen=True)
class CausalMask:
    """A mask [B, 1, M, K] that hides nothing but later tokens and what a sliding window leaves.

    A single query needs none, until its window is full: as Hugging Face does, which gives some
    kernels a mask then. skipped: the stack made none for the first columns, whose query says that
    it is causal.
    """

    table: Tensor
    window: int | None
    skipped: bool

    def cut(self, at: Span) -> Tensor | None:
        if at.new == 1 and (self.window is None or at.end < self.window):
            return None
        if self.skipped and at.first == 0:
            return None
        return _rows_and_columns(self.table, at)


def causal_mask(
    mask: Tensor, origin: int, window: int | None, *, skipped: bool = False
) -> CausalMask | Tensor:
    """`mask` [B, 1, M, origin + M] as a `CausalMask`, where it is one.

    Raises:
        CannotRehearseError: a mask of another shape, as other kinds of attention have.
    """
    if mask.dim() != 4 or mask.shape[-1] != origin + mask.shape[-2]:
        raise CannotRehearseError(f"a mask of shape {tuple(mask.shape)}")
    seen = mask if mask.dtype == torch.bool else mask == 0
    plain = causal(origin, mask.shape[-2], window, mask.device)
    if bool((seen == plain).all()):
        return CausalMask(mask, window, skipped)
    return mask


def causal(origin: int, tokens: int, window: int | None, device: torch.device) -> Tensor:
    """Which columns [tokens, origin + tokens] each of the tokens behind column `origin` sees."""
    query = torch.arange(origin, origin + tokens, device=device)[:, None]
    column = torch.arange(origin + tokens, device=device)
    seen = column <= query
    return seen if window is None else seen & (column > query - window)


def named(call: LayerCall) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Which of a call's arguments came by position, and all of them by name."""
    names = [*inspect.signature(type(call.layer).forward).parameters][2 : 2 + len(call.args)]
    return tuple(names), {**dict(zip(names, call.args, strict=True)), **call.kw}


class Arguments:
    """The arguments of one or more layers for columns from `origin` on."""

    def __init__(
        self, call: LayerCall, origin: int, window: int | None, masks: Callable[[], Tensor] | None
    ) -> None:
        """masks: makes the mask of a stack that made none.

        Raises:
            CannotRehearseError: an argument that is not known.
        """
        self.by_position, values = named(call)
        self._fixed: dict[str, Any] = {}
        self._cuts: list[tuple[str, Callable[[Any, Span], Any], Any]] = []
        self._origin, self._window = origin, window
        for name, value in values.items():
            mask = value
            if name == "attention_mask" and value is None and masks is not None:
                mask = masks()
            if name == "attention_mask" and mask is not None:
                table = causal_mask(mask, origin, window, skipped=value is None)
                cut = CausalMask.cut if isinstance(table, CausalMask) else _rows_and_columns
                self._cuts.append((name, cut, table))
            elif name in CACHE_NAMES or value is None or isinstance(value, (bool, str)):
                self._fixed[name] = value
            elif name in CUTS and isinstance(value, (Tensor, tuple)):
                self._cuts.append((name, CUTS[name], value))
            else:
                raise CannotRehearseError(f"argument {name}, a {type(value).__name__}")

    def at(self, first: int, end: int, cache: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """By position and by name, for the tokens at columns `first` to `end`."""
        start = 0 if self._window is None else max(0, first - self._window + 1)
        span = Span(first - self._origin, end - first, start, end, first)
        values = dict(self._fixed)
        for name, cut, table in self._cuts:
            values[name] = cut(table, span)
        for name in CACHE_NAMES:
            if name in values:
                values[name] = cache
        return tuple([values.pop(name) for name in self.by_position]), values


def same(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """The name of an argument of a layer that differs between two calls; None where none does.

    A mask of zeros, which attention adds, is as good as none.
    """
    for name in {*ours, *theirs} - {*CACHE_NAMES}:
        mine, other = ours.get(name), theirs.get(name)
        if not _equal(mine, other) and not (name == "attention_mask" and _nothing(mine, other)):
            return name
    return None


def _nothing(mine: Any, mask: Any) -> bool:
    added = isinstance(mask, Tensor) and mask.dtype != torch.bool
    return mine is None and added and not bool(mask.any())


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other) and bool(one == other)
