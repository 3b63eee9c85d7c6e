"""Attention for packed calls: linear layers see all tokens in one row, attention sees them by slot.

A deep call has many tokens of few slots. As a row each [N, 1], every token would need its slot's
keys gathered for it; side by side [R, W], the linear layers would run on padding. So the tokens
form one row [1, N], and attention alone lays its queries out by slot, reading each slot's keys once
and in place. It stands in twins of the attention modules, selected in a copy of their config.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from offramp.engine.executors.slots.layout import CurrentCall, SlotCall
from offramp.models.discovery.twin import graft, twin

PACKED = "offramp_packed"


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
    """Attention [1, N, H, Dh] of queries [1, H, N, Dh] to keys and values [R, Hk, K, Dh].

    attention_mask, position_bias: additive, of the queries by slot [R, 1 or H, W, K]. Query heads
    that share a key head stand beside each other, so that keys are not repeated for them.
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


def with_packed_attention(layer: nn.Module, current: CurrentCall) -> Any:
    """A twin of a decoder layer or an exit whose attention is `packed_attention`."""
    return with_attention(layer, PACKED, _current=current)


def attentions(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """Attention modules in a decoder layer or an exit, by path."""
    return [
        (path, module)
        for path, module in layer.named_modules()
        if path and hasattr(module, "layer_idx") and hasattr(module, "is_causal")
    ]


def with_attention(layer: nn.Module, name: str, **known: Any) -> Any:
    """A twin of a decoder layer or an exit whose attention is what Hugging Face's table has under
    `name`. known: what that finds among its module's attributes."""
    ours: Any = twin(layer)
    ours._compiled_call_impl = None  # would run the layer that it was compiled from
    for path, module in attentions(layer):
        attention: Any = twin(module)
        attention.config = copy.copy(attention.config)
        attention.config._attn_implementation_internal = name
        attention.__dict__.update(known)
        graft(ours, path, attention)
    return ours


def can_pack(stack: Any) -> bool:
    """Whether the attention of a stack is the one that `packed_attention` computes."""
    return bool(stack.config._attn_implementation == "sdpa")
