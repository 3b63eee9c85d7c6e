"""A drop-in for the decoder stack: it calls the layers one after the other, and nothing else.

A stack prepares rotary tables, masks and positions for each token anew. Here they come out of a
rehearsal (`offramp.engine.lean.rehearsal`), and keys and values go into preallocated buffers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from offramp.engine.kv_cache import self_attention
from offramp.engine.lean.arguments import CannotRehearseError
from offramp.engine.lean.cache import beside_encoder, like, move
from offramp.engine.lean.compiled import called_in_place
from offramp.engine.lean.rehearsal import CHECKED, TOKENS, Rehearsal, Stage, ahead, check
from offramp.models.backbone import Backbone, LayerCall
from offramp.models.exits import first as state_of
from offramp.models.intercept import LayerHandler

log = logging.getLogger(__name__)

_SHOWN: WeakKeyDictionary[Backbone, dict[Any, bool | str]] = WeakKeyDictionary()
"""What checks showed, by kind of call: whether positions are added to embeddings, or why a stack
must run itself."""


class Driver(LayerHandler, Protocol):
    """A layer handler that says where a call begins, and when it has ended.

    start: the layer that the states of the current call enter. tokens: columns that have entered
    the first layer before this call. ended: whether the layers that follow have nothing to do.
    """

    @property
    def start(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def ended(self) -> bool: ...


class StackOutput(NamedTuple):
    """States [B, T, D] behind the final norm; without it where the call ended early."""

    last_hidden_state: Tensor


class LeanStack:
    """Called as the stack is, with token ids or with states that enter a deeper layer.

    cache: what the layers write to. A call that begins before the column `linear_from`, where
    positions and padding are the prompt's, is one of the stack itself, with the same cache.
    """

    def __init__(
        self,
        backbone: Backbone,
        driver: Driver,
        whole: Callable[..., Any],
        stage: Stage,
        cache: Any,
        linear_from: int,
        positions: bool,
    ) -> None:
        self.cache = cache
        self._backbone, self._driver, self._whole, self._stage = backbone, driver, whole, stage
        self._columns, self._layers = self_attention(cache).columns, [*backbone.layers]
        self._linear_from, self._positions = linear_from, positions
        self._rehearsal: Rehearsal | None = None
        self._instead = called_in_place(backbone)

    def __call__(self, **kw: Any) -> Any:
        driver, columns = self._driver, self._columns
        start = driver.start
        entering: Tensor = kw["inputs_embeds"] if start else kw["input_ids"]
        rows, new = entering.shape[:2]
        end = driver.tokens + (0 if start else new)
        first = columns.first = end - new
        columns.end = end
        if first < self._linear_from:
            return self._whole(**kw)
        rehearsal = self._rehearsal
        if rehearsal is None or not rehearsal.covers(first, end, rows):
            rehearsal = self._rehearsal = self._rehearse(kw, first, end, rows)
        hidden = entering if start else rehearsal.enter(entering, first)
        arguments, kind_of = rehearsal.arguments(first, end, self.cache), rehearsal.kind_of
        layers, instead = self._layers, self._instead
        for index in range(start, len(kind_of)):
            args, names = arguments[kind_of[index]]
            call = LayerCall(index, layers[index], hidden, args, names, instead)
            hidden = state_of(driver.layer(call))
            if driver.ended:
                return StackOutput(hidden)
        return StackOutput(self._backbone.final_norm(hidden))

    def forget(self) -> None:
        """Rehearse anew: rows were taken out."""
        self._rehearsal = None

    def _rehearse(self, kw: Mapping[str, Any], first: int, end: int, rows: int) -> Rehearsal:
        return rehearse(self._stage, kw, self.cache, first, end, rows, self._positions)


def rehearse(
    stage: Stage,
    kw: Mapping[str, Any],
    cache: Any,
    first: int,
    end: int,
    rows: int,
    positions: bool,
) -> Rehearsal:
    """Of columns from `first` on, with the arguments of a call that ends at column `end`."""
    tokens = end - first + TOKENS
    limit = stage.backbone.positions
    if limit is not None:
        mask = kw.get("attention_mask")
        read = end if mask is None else int(mask.sum(1).max())
        tokens = end - first + min(TOKENS, max(0, limit - read))
    weight = stage.embed.weight
    states = torch.zeros(
        rows, tokens, stage.backbone.width, dtype=weight.dtype, device=weight.device
    )
    given = {**ahead(kw, end, first, tokens), "inputs_embeds": states}
    return Rehearsal(stage, given, cache, first, tokens, positions)


def lean_stack(
    backbone: Backbone,
    driver: Driver,
    whole: Callable[..., Any],
    cache: Any,
    kw: Mapping[str, Any],
) -> LeanStack | None:
    """A stand-in for the stack `whole`, to which the cache's keys and values are moved; None where
    the stack must run itself: unknown arguments, recurrent states, several devices.

    kw: arguments of the first call behind the prompt.
    """
    if backbone.sharded or backbone.rare_layers or backbone.reads_ids:
        return None
    ids: Tensor = kw["input_ids"]
    rows, end = len(ids), driver.tokens + ids.shape[1]
    if backbone.positions is not None and end + CHECKED > backbone.positions:
        return None
    own = like(cache, driver.tokens)
    if own is None or len(own.layers) < backbone.depth:
        return None
    ours = beside_encoder(own, cache)
    shown = _SHOWN.setdefault(backbone, {})
    attention = getattr(backbone.text_config, "_attn_implementation", None)
    kind = (attention, rows > 1, *sorted(name for name, value in kw.items() if value is not None))
    try:
        stage = Stage(backbone)
        if kind not in shown:
            rehearsal = rehearse(stage, kw, ours, driver.tokens, end, rows, True)
            shown[kind] = check(stage, rehearsal, kw, ours, end)
    except CannotRehearseError as error:
        shown[kind] = str(error)
    positions = shown[kind]
    if isinstance(positions, str):
        log.debug("The stack of %s runs itself: %s", backbone.name, positions)
        return None
    move(cache, own)
    linear_from = 0 if backbone.is_encoder_decoder else driver.tokens
    return LeanStack(backbone, driver, whole, stage, ours, linear_from, positions)
