"""Attention of several tokens in one call, to the bit what each would get alone.

In bfloat16 a sum over keys is rounded by how many keys the call has. Linears here are the same for
one token and for many; with this attention is too, so that drafts that are verified together, and
tokens that catch up together, get the very states that they would get one by one.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "offramp_by_token"
_MOST = 16
"""Tokens of a call; more are a prompt's, which always come together."""


def attention_by_token(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return attention [B, T, H, Dh] of queries [B, H, T, Dh] to keys and values [B, Hk, K, Dh],
    whose last T are the queries' own; each query is computed in a call of its own.

    attention_mask, position_bias: [B or 1, 1 or H, T, K].
    """
    tokens, keys = query.shape[2], key.shape[2]
    by_query = (attention_mask, position_bias)
    if not 1 < tokens <= min(_MOST, keys - 1) or not getattr(module, "is_causal", False):
        mask, bias = by_query
        return sdpa_attention_forward(
            module, query, key, value, mask, position_bias=bias, **options
        )
    out = []
    for token in range(tokens):
        seen = keys - tokens + token + 1
        mask, bias = (None if of is None else of[:, :, token : token + 1, :seen] for of in by_query)
        if mask is not None and _hides_nothing(mask):
            mask = None  # as stacks leave it out for one token
        made, _ = sdpa_attention_forward(
            module,
            query[:, :, token : token + 1],
            key[:, :, :seen],
            value[:, :, :seen],
            mask,
            position_bias=bias,
            **options,
        )
        out.append(made)
    return torch.cat(out, 1), None


def _hides_nothing(mask: Tensor) -> bool:
    return bool(mask.all() if mask.dtype == torch.bool else not mask.any())


ALL_ATTENTION_FUNCTIONS.register(_NAME, attention_by_token)


def attend_by_token(layers: nn.Module) -> None:
    """Replace the layers' own attention by `attention_by_token`, where it is torch's."""
    for module in layers.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(module, "is_causal") and getattr(config, "_attn_implementation", "") == "sdpa":
            ours = copy.copy(config)
            ours._attn_implementation_internal = _NAME
            module.config = ours
