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

Of each: every query is a call of its own on the keys that are there for it. How sums are split
depends on how many queries and keys a call has; so what a token gets does not depend on the tokens
beside it, to the last bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from offramp.core.errors import UnsupportedBackboneError
from offramp.core.executors.slots.cache import Call, CurrentCall, SlotCall
from offramp.core.models.backbone import Backbone
from offramp.core.models.discovery.twin import graft, twin
from offramp.core.models.exits import ExitSet
from offramp.core.models.weights import OwnLinear

MASKED, PACKED, EACH = "offramp_slots", "offramp_packed", "offramp_each"


# -- masks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskRule:
    """The rule that a mask was made by. allowed: Hugging Face's function of (row, head, query,
    key), or None in cross-attention, where an encoder's tokens alone are hidden."""

    allowed: Callable[..., Any] | None
    dtype: torch.dtype

    @property
    def causal(self) -> bool:
        """Return True if nothing but later tokens is hidden."""
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


class WithAttention(dict[Any, Any]):
    """Twins by `with_attention` that are called in the place of layers and exits; each is made when
    first asked for."""

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


# -- exact batches --------------------------------------------------------------------------------

ROW_BY_ROW = (OwnLinear, nn.Embedding)
"""Modules that make of a row what they make of it alone."""


def check_exact_batches(backbone: Backbone, exits: ExitSet | None, ours: bool) -> None:
    """Raise `UnsupportedBackboneError` where a token would depend on the tokens beside it.

    ours: whether attention is one that `attention_of_each` computes.
    """
    remedy = "Leave exact batches out: answers then differ by rounding alone."
    if not ours or backbone.is_encoder_decoder:
        kind = "an encoder" if backbone.is_encoder_decoder else "attention other than sdpa"
        raise UnsupportedBackboneError(
            f"Exact batches are not known of models with {kind}, as {backbone.name} is.", remedy
        )
    if backbone.decoding.instead is not None:
        raise UnsupportedBackboneError(
            "Compiled code of one token is other code than that of several.", remedy
        )
    found = next(_others(backbone, exits), None)
    if found is not None:
        raise UnsupportedBackboneError(
            "Exact batches need matrix multiplications in which no row depends on another, and "
            f"{found} has others.",
            "Lay the weights out first: offramp.load(name, engine='exact-batches'). "
            "Experts and weights quantised by a library have none.",
        )


def _others(backbone: Backbone, exits: ExitSet | None) -> Iterator[str]:
    """Modules with a weight that is multiplied otherwise."""
    if not isinstance(backbone.reader, OwnLinear):
        yield "the LM head"
    parts: dict[str, nn.Module] = {"layers": backbone.layers}
    if exits is not None:
        parts["exits"] = exits.modules
    for name, part in parts.items():
        for path, module in part.named_modules():
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if not isinstance(module, ROW_BY_ROW) and any(weight.dim() > 1 for weight in own):
                yield f"{name}.{path}"
