"""Linears whose weights are laid out as a processor reads them: the same numbers, read faster.

PyTorch multiplies a few tokens with a plain weight at half the speed of the processor's memory, and
rearranges a bfloat16 weight at every call. oneDNN's layout, made once, is what compiled models
freeze; here every loop has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from offramp.core.errors import InputError
from offramp.core.models.weights import OwnLinear

LEAST = 2**19
"""Numbers of a weight in float32 below which a plain product of one token is faster."""
_LAID_OUT_FOR = 16
"""Tokens that the layout is chosen for: it is as good for 1 to 64."""

ROWS = 4
"""Fewer tokens than these take longer than these do, on the processors that were measured."""


def filled_up(states: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the result of `product`, a function of rows [N, in] with N at least `ROWS`, for states
    [..., in]."""
    rows = states.reshape(-1, states.shape[-1])
    tokens = len(rows)
    if tokens < ROWS:
        rows = functional.pad(rows, (0, 0, 0, ROWS - tokens))
    made = product(rows)
    return made[:tokens].view(*states.shape[:-1], made.shape[-1])


class PrepackedLinear(OwnLinear):
    """A linear layer in oneDNN's layout, from states [..., in] to [..., out]; for inference."""

    weight: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features: int = linear.in_features
        self.out_features: int = linear.out_features
        self.bias: nn.Parameter = linear.bias
        weight = linear.weight.detach().contiguous()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _LAID_OUT_FOR)
        self.register_buffer("weight", packed, persistent=False)

    def forward(self, states: Tensor) -> Tensor:
        """Return states [..., out]. Raise `InputError` where gradients are wanted, as in
        training."""
        if states.requires_grad and torch.is_grad_enabled():
            raise InputError(
                "Prepacked weights were to be trained through, and are for inference alone.",
                "Train on the model as it was loaded, and prepack it afterwards.",
            )
        return filled_up(
            states,
            lambda rows: torch.ops.mkldnn._linear_pointwise(
                rows, self.weight, self.bias, "none", [], ""
            ),
        )

    def dense(self) -> Tensor:
        """The weight [out, in], bit for bit."""
        return self.weight.to_dense()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """As the plain linear would."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.dense()

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def is_worth_it(weight: Tensor) -> bool:
    """Return True if one token is multiplied faster in this layout."""
    return weight.dtype != torch.float32 or weight.numel() >= LEAST


def prepacked(linear: nn.Linear) -> PrepackedLinear:
    """Return a copy of a linear in oneDNN's layout.

    Raises:
        InputError: the linear is not on a CPU, or in a precision that this CPU cannot multiply in.
    """
    weight = linear.weight
    precision = str(weight.dtype).removeprefix("torch.")
    if weight.device.type != "cpu":
        raise InputError(
            f"Weights are laid out for a processor, and the model is on {weight.device}.",
            "Load it with device='cpu' (--device cpu), or leave prepacking out.",
        )
    known = [torch.float32]
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        known.append(torch.bfloat16)
    here = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if weight.dtype not in known or not here:
        raise InputError(
            f"This processor's oneDNN has no matrix multiplication in {precision}.",
            "Load the model in float32 (--dtype float32), or leave prepacking out.",
        )
    return PrepackedLinear(linear)
