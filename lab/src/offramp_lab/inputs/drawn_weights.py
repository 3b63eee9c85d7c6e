"""Weights that take memory and mean nothing, drawn in seconds."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def fill(model: nn.Module, dtype: torch.dtype, seed: int) -> None:
    """Give every parameter memory and a value, tied ones together.

    Matrices take turns reading from one pool of normal numbers: drawing billions would take
    minutes. Its length is odd, so that rows do not repeat.
    """
    draw = torch.Generator().manual_seed(seed)
    pool = torch.randn(4_194_301, generator=draw).mul_(0.02).to(dtype)
    filled: dict[int, nn.Parameter] = {}
    offset = 0
    for module in model.modules():
        for name, empty in module._parameters.items():
            if empty is None:
                continue
            if id(empty) not in filled:
                value = torch.empty(empty.shape, dtype=dtype)
                if empty.dim() > 1:
                    _copy_round(pool, offset, value.view(-1))
                    offset = (offset + value.numel()) % len(pool)
                else:
                    value.fill_(0.0 if name == "bias" else 1.0)
                filled[id(empty)] = nn.Parameter(value, requires_grad=False)
            module._parameters[name] = filled[id(empty)]


def _copy_round(pool: Tensor, offset: int, flat: Tensor) -> None:
    """Fill `flat` from the pool, from `offset` on and round and round."""
    done = 0
    while done < len(flat):
        chunk = pool[offset : offset + len(flat) - done]
        flat[done : done + len(chunk)] = chunk
        done, offset = done + len(chunk), 0
