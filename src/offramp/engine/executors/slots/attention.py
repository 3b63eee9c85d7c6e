"""Attention of our own, which stands in twins of the attention modules, selected in a copy of their
config.

Packed: linear layers see all tokens in one row, attention sees them by slot. A deep call has many
tokens of few slots. As a row each [N, 1], every token would need its slot's keys gathered for it;
side by side [R, W], the linear layers would run on padding. So the tokens form one row [1, N], and
attention alone lays its queries out by slot, reading each slot's keys once and in place.

Of each: every query is a call of its own on the keys that are there for it. How sums are split
depends on how many queries and keys a call has; so what a token gets does not depend on the tokens
beside it, to the last bit.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from offramp.engine.executors.slots.layout import Call, SlotCall
from offramp.models.discovery.twin import graft, twin

PACKED, EACH = "offramp_packed", "offramp_each"


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


def attention_of_each(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention [B, T, H, Dh] of queries [B, H, T, Dh] to keys and values [R, Hk, K, Dh].

    attention_mask: additive, of the queries by slot [R, 1 or H, W, K]; where it hides none of the
    keys up to a token's own, it is left out, as it is where a token is alone.
    """
    call: Call = module.__dict__["_current"].call
    batch, heads, tokens, size = query.shape
    queries = query.transpose(1, 2).reshape(batch * tokens, key.shape[1], -1, size)
    hides = _hidden(call, attention_mask)
    made = []
    for n, (row, place, column) in enumerate(call.places):
        keys, values = (held[row : row + 1, :, : column + 1] for held in (key, value))
        mask = None
        if attention_mask is not None and hides[n]:
            mask = attention_mask[row : row + 1, :, place : place + 1, : column + 1]
        out = nn.functional.scaled_dot_product_attention(
            queries[n : n + 1], keys, values, attn_mask=mask, scale=scaling
        )
        made.append(out)
    return torch.cat(made).view(batch, tokens, heads, size), None


def _hidden(call: Call, mask: Tensor | None) -> list[bool]:
    """Of each token, whether a mask hides a key up to its own; found once for a call's layers."""
    known: dict[int, tuple[Any, list[bool]]] = call.__dict__.setdefault("hidden", {})
    if id(mask) not in known:
        found = [
            mask is not None and bool((mask[row, :, place, : column + 1] != 0).any())
            for row, place, column in call.places
        ]
        known[id(mask)] = mask, found  # held, so that no other gets its number
    return known[id(mask)][1]


ALL_ATTENTION_FUNCTIONS.register(PACKED, packed_attention)
ALL_ATTENTION_FUNCTIONS.register(EACH, attention_of_each)


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
    """Whether the attention of a stack is the one that is computed here."""
    return bool(stack.config._attn_implementation == "sdpa")
