"""Masks and attention of calls in which every query stands at a column of its own.

Causal, sliding and chunked masks are Hugging Face's own functions of (row, head, query, key); here
they are given each query's column in place of one offset for all. Mask and attention functions are
added to Hugging Face's tables under names of ours, and selected in copies of a twin's config: no
config of the user's model is touched. Where it takes attention of our own, that stands in twins of
the attention modules.

Packed: linear layers see all tokens in one row, attention sees them by slot. A deep call has many
tokens of few slots. As a row each [N, 1], every token would need its slot's keys gathered for it;
side by side [R, W], the linear layers would run on padding. So the tokens form one row [1, N], and
attention alone lays its queries out by slot, reading each slot's keys once and in place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from offramp.core.errors import UnsupportedBackboneError
from offramp.core.executors.slots.cache import CurrentCall, SlotCall
from offramp.core.models.discovery.twin import graft, twin

MASKED, PACKED = "offramp_slots", "offramp_packed"


# -- masks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskRule:
    """The rule that a mask was made by. allowed: Hugging Face's function of (row, head, query,
    key); None in cross-attention, where only the encoder's padding is hidden."""

    allowed: Callable[..., Any] | None
    dtype: torch.dtype

    @property
    def causal(self) -> bool:
        """Return True if later tokens are hidden, and no others."""
        return self.allowed is causal_mask_function

    def mask(self, queries: Tensor, width: int, encoder: Tensor | None = None) -> Tensor:
        """Return an additive mask [R, 1, W, K] of `width` columns for queries at columns [R, W].

        encoder: which of the encoder's tokens [R, K] are there.
        """
        device = queries.device
        if self.allowed is None:
            assert encoder is not None
            allowed = encoder[:, None, None].bool()
        else:
            rows = torch.arange(len(queries), device=device)[:, None, None, None]
            keys = torch.arange(width, device=device)[None, None, None]
            heads = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
            allowed = self.allowed(rows, heads, queries[:, None, :, None], keys)
        made = torch.zeros(allowed.shape, dtype=self.dtype, device=device)
        return made.masked_fill_(~allowed, torch.finfo(self.dtype).min)


def slot_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: Any = "cpu",
    **_: Any,
) -> Tensor:
    """Return an additive mask [R, 1, W, K].

    q_offset: columns of the queries [R, W]. In cross-attention q_offset is a number, and the result
    is made of `attention_mask` [R, K], which marks the encoder's tokens.
    """
    if isinstance(q_offset, Tensor):
        rule = MaskRule(mask_function, dtype)
        made = rule.mask(q_offset, kv_length)
    else:
        assert attention_mask is not None
        rule = MaskRule(None, dtype)
        made = rule.mask(attention_mask, kv_length, attention_mask)
    made.rule = rule  # type: ignore[attr-defined]
    return made


AttentionMaskInterface.register(MASKED, slot_mask)

PLAIN = ("sdpa", "eager")
"""Attention that takes a dense mask."""


def with_slot_masks(stack: Any) -> str:
    """Make the twin `stack` use `slot_mask` for its masks; return the name of its attention before.

    Raises:
        UnsupportedBackboneError: its attention takes no dense mask (flash, flex).
    """
    used = getattr(getattr(stack, "config", None), "_attn_implementation", None)
    if used not in PLAIN:
        raise UnsupportedBackboneError(
            f"Attention {used!r} cannot run rows of different lengths from one cache.",
            "Load the model with attn_implementation='sdpa'.",
        )
    stack.config = copy.copy(stack.config)
    stack.config._attn_implementation_internal = MASKED  # the setter would reach into sub-configs
    return str(used)


# -- attention ------------------------------------------------------------------------------------


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return attention [1, N, H, Dh] of queries [1, H, N, Dh] to keys and values [R, Hk, K, Dh].

    attention_mask, position_bias: additive, of the queries by slot [R, 1 or H, W, K]. Query heads
    with a common key head stand beside each other, so that keys need no copies.
    """
    call: SlotCall = module.__dict__["_current"].call
    assert call.gather is not None and call.pick is not None
    (rows, wide), heads = call.queries.shape, query.shape[1]
    laid = query[0].index_select(1, call.gather).view(heads, rows, wide, -1).transpose(0, 1)
    mask = attention_mask if position_bias is None else attention_mask + position_bias
    groups = heads // key.shape[1]
    if groups > 1:
        laid = laid.reshape(rows, key.shape[1], groups * wide, -1)
        mask = mask.expand(-1, -1, wide, -1).repeat(1, 1, groups, 1)
    out = nn.functional.scaled_dot_product_attention(
        laid, key, value, attn_mask=mask, scale=scaling
    )
    by_head = out.reshape(rows, heads, wide, -1).transpose(0, 1).flatten(1, 2)
    return by_head.index_select(1, call.pick).transpose(0, 1)[None].contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(PACKED, packed_attention)


def attentions(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """Attention modules in a decoder layer or an exit, by path."""
    return [
        (path, module)
        for path, module in layer.named_modules()
        if path and hasattr(module, "layer_idx") and hasattr(module, "is_causal")
    ]


def with_attention(layer: nn.Module, name: str, **known: Any) -> Any:
    """Return a twin of a decoder layer or an exit with the attention called `name` in Hugging
    Face's table. known: attributes that this attention finds on its module."""
    ours: Any = twin(layer)
    ours._compiled_call_impl = None  # would run the layer that it was compiled from
    for path, module in attentions(layer):
        attention: Any = twin(module)
        attention.config = copy.copy(attention.config)
        attention.config._attn_implementation_internal = name
        attention.__dict__.update(known)
        graft(ours, path, attention)
    return ours


class WithAttention(dict[Any, Any]):
    """Twins by `with_attention` that are called in the place of layers and exits; each twin is made
    when first asked for."""

    def __init__(self, name: str, current: CurrentCall, plain: Mapping[Any, Any] | None) -> None:
        """plain: what is called in a twin's place; None: the twin."""
        super().__init__()
        self._name, self._current, self._plain = name, current, plain

    def __missing__(self, module: Any) -> Any:
        if not isinstance(module, nn.Module):
            return module  # a method
        ours = with_attention(module, self._name, _current=self._current)
        made = self[module] = ours if self._plain is None else self._plain[ours]
        return made
