"""Weights of quantised linears as floats: torchao, bitsandbytes in 8 and 4 bits, quanto.

The backbone stays as it is. An exit beside it is a float copy, which can be trained and saved, and
a fingerprint is taken of the values that the backbone computes with.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import UnsupportedBackboneError


def is_quantized(module: nn.Module) -> bool:
    """Whether this module alone holds its weight in fewer bits."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not hasattr(module, "in_features"):
        return False
    return not weight.is_floating_point() or type(weight.data) is not Tensor


def scheme(module: nn.Module) -> str | None:
    """What holds the weights: the class of the first quantised linear or of its weight."""
    for part in module.modules():
        if is_quantized(part):
            own = type(part).__name__
            return type(part.weight).__name__ if own == "Linear" else own
    return None


@torch.no_grad()
def dequantized(linear: Any) -> Tensor:
    """The weight [out, in] that a quantised linear computes with.

    Raises:
        UnsupportedBackboneError: a scheme that is not known.
    """
    weight, kind = linear.weight, type(linear).__name__
    if kind == "Linear4bit":
        import bitsandbytes.functional as bits

        return bits.dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[no-any-return]
    if kind == "Linear8bitLt":
        codes = weight.data if linear.state.CB is None else linear.state.CB
        scales = weight.SCB if linear.state.SCB is None else linear.state.SCB
        return codes.float() * scales.float()[:, None] / 127  # type: ignore[no-any-return]
    if hasattr(weight, "dequantize") and type(weight.data) is not Tensor:
        return weight.dequantize()  # type: ignore[no-any-return]
    raise UnsupportedBackboneError(
        f"Weights of {kind} ({type(weight).__name__}, {weight.dtype}) cannot be read as floats.",
        "Known are torchao's weight-only tensors, bitsandbytes in 8 and 4 bits, and quanto; load "
        "the model in one of them, or in float.",
    )


def float_copy(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A deep copy whose quantised linears are plain ones of the same values, in `dtype`."""
    memo: dict[int, Any] = {}
    for part in layer.modules():
        if is_quantized(part):
            memo[id(part)] = _plain(part, dtype)
    return copy.deepcopy(layer, memo)


def _plain(linear: Any, dtype: torch.dtype) -> nn.Linear:
    bias = getattr(linear, "bias", None)
    made = nn.Linear(linear.in_features, linear.out_features, bias=bias is not None, device="meta")
    made.weight = nn.Parameter(dequantized(linear).detach().to(dtype, copy=True))
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().to(dtype, copy=True))
    return made


def float_parameters(module: nn.Module, besides: Collection[int] = ()) -> Iterator[Tensor]:
    """Parameters in the order of `module.parameters()`, quantised ones as the floats they mean.

    besides: ids of parameters that are left out.
    """
    seen = set(besides)
    for part in module.modules():
        quantized = is_quantized(part)
        for name, parameter in part._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            yield dequantized(part) if quantized and name == "weight" else parameter


def float_dtype(module: nn.Module) -> torch.dtype:
    """The precision of the states: that of a norm, which no scheme quantises."""
    plain = (p for p in module.parameters() if p.is_floating_point() and type(p.data) is Tensor)
    first = next(plain)
    return next((p for p in chain([first], plain) if p.dim() == 1), first).dtype
