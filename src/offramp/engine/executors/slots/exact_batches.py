"""What it takes for a token to be the same to the last bit in any company."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from offramp.errors import UnsupportedBackboneError
from offramp.models.backbone import Backbone
from offramp.models.exits import ExitSet
from offramp.models.quantized.linears import QuantizedLinear
from offramp.models.quantized.prepacked import PrepackedLinear

ROW_BY_ROW = (PrepackedLinear, QuantizedLinear, nn.Embedding)
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
    if backbone.decoding.compiled:
        raise UnsupportedBackboneError(
            "Compiled code of one token is other code than that of several.", remedy
        )
    found = next(_others(backbone, exits), None)
    if found is not None:
        raise UnsupportedBackboneError(
            f"Exact batches need products whose rows do not depend on each other, and {found} has "
            "others.",
            "Lay the weights out first: adapter.with_exact_batches(), or --engine exact-batches. "
            "Experts and weights quantised by a library have no such products.",
        )


def _others(backbone: Backbone, exits: ExitSet | None) -> Iterator[str]:
    """Modules with a weight that is multiplied otherwise."""
    if not isinstance(backbone.reader, PrepackedLinear):
        yield "the LM head"
    parts: dict[str, nn.Module] = {"layers": backbone.layers}
    if exits is not None:
        parts["exits"] = exits.modules
    for name, part in parts.items():
        for path, module in part.named_modules():
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if not isinstance(module, ROW_BY_ROW) and any(weight.dim() > 1 for weight in own):
                yield f"{name}.{path}"
