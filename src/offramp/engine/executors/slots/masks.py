"""Attention masks of calls in which every query stands at a column of its own.

Causal, sliding and chunked masks are Hugging Face's own functions of (row, head, query, key); here
they are given each query's column in place of one offset for all. The mask functions are added to
Hugging Face's table under names of ours, and selected in a copy of the twin stack's config: no
config of the user's model is touched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from offramp.errors import UnsupportedBackboneError

MASKED = "offramp_slots"


@dataclass(frozen=True)
class MaskRule:
    """What a mask was made by. allowed: Hugging Face's function of (row, head, query, key), or None
    in cross-attention, where an encoder's tokens alone are hidden."""

    allowed: Callable[..., Any] | None
    dtype: torch.dtype

    @property
    def causal(self) -> bool:
        """Whether nothing but later tokens is hidden."""
        return self.allowed is causal_mask_function

    def mask(self, queries: Tensor, width: int, encoder: Tensor | None = None) -> Tensor:
        """An additive mask [R, 1, W, K] of `width` columns for queries at columns [R, W].

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


def rule_of(mask: Any) -> MaskRule | None:
    """What `slot_mask` made a mask by; None of another one."""
    return getattr(mask, "rule", None)


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
    """An additive mask [R, 1, W, K].

    q_offset: columns of the queries [R, W]; a number in cross-attention, whose mask is
    `attention_mask` [R, K], the encoder's.
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


def with_slot_masks(stack: Any) -> None:
    """Let the twin `stack` ask `slot_mask` for its masks.

    Raises:
        UnsupportedBackboneError: its attention takes no dense mask (flash, flex).
    """
    used = stack.config._attn_implementation
    if used not in PLAIN:
        raise UnsupportedBackboneError(
            f"Attention {used!r} cannot run rows of different lengths from one cache.",
            "Load the model with attn_implementation='sdpa'.",
        )
    stack.config = copy.copy(stack.config)
    stack.config._attn_implementation_internal = MASKED  # the setter would reach into sub-configs
