"""Exact batches: every query is a call of its own on the keys that are there for it.

How sums are split depends on how many queries and keys a call has; so what a token gets does not
depend on the tokens beside it, to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from offramp.core.errors import UnsupportedBackboneError
from offramp.core.executors.slots.cache import Call
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import ExitSet
from offramp.core.models.weights import OwnLinear

EACH = "offramp_each"
ROW_BY_ROW = (OwnLinear, nn.Embedding)
"""Modules that make of a row what they make of it alone."""


class ExactBatches:
    """Attention to each token by itself, for `DecodeOptions.exact_batches`."""

    attention = EACH

    def check(self, backbone: Backbone, exits: ExitSet | None, ours: bool) -> None:
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


def attention_of_each(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return attention [B, T, H, Dh] of queries [B, H, T, Dh] to keys and values [R, Hk, K, Dh].

    attention_mask: additive, of the queries by slot [R, 1 or H, W, K]; left out where it hides no
    key up to a token's own, as for a token that is alone.
    """
    call: Call = module.__dict__["_current"].call
    batch, heads, tokens, size = query.shape
    queries = query.transpose(1, 2).reshape(batch * tokens, key.shape[1], -1, size)
    hides = _hidden(call, attention_mask)
    made = []
    for n, (row, place, column) in enumerate(_places(call)):
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
            for row, place, column in _places(call)
        ]
        known[id(mask)] = mask, found  # held, so that no other gets its number
    return known[id(mask)][1]


def _places(call: Call) -> list[tuple[int, int, int]]:
    """Of each token of a call the row of queries, the place in it, and the column."""
    known: list[tuple[int, int, int]] | None = call.__dict__.get("places")
    if known is None:
        wide, columns = call.queries.shape[1], call.columns.tolist()
        picked = range(len(columns)) if call.pick is None else call.pick.tolist()
        both = zip(picked, columns, strict=True)
        known = call.__dict__["places"] = [(at // wide, at % wide, c) for at, c in both]
    return known


ALL_ATTENTION_FUNCTIONS.register(EACH, attention_of_each)
EXACT_BATCHES = ExactBatches()
