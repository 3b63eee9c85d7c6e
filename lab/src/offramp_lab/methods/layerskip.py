"""LayerSkip (Elhoushi et al. 2024): a model whose own head reads every layer drafts for itself.

It has no exit layers: an adapter with exits of the kind "lens" at a depth drafts, and the layers
above verify. Unlike all else here the backbone itself is trained, by the loss below.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.core.models.backbone import Backbone


def dropout_rates(layers: int, largest: float) -> list[float]:
    """Return the rate at which each layer is dropped, from 0 to `largest` for the last one."""
    return [largest * (2 ** (layer / max(1, layers - 1)) - 1) for layer in range(layers)]


def loss_weights(layers: int, scale: float) -> list[float]:
    """Return each layer's weight in the loss; weights grow with depth and add up to 1."""
    sums = [scale * n for n in accumulate(range(layers))]
    last = layers - 1 + (sums[-2] if layers > 1 else 1)
    weights = [*sums[:-1], last]
    return [weight / sum(weights) for weight in weights]


def early_exit_loss(
    backbone: Backbone,
    inputs: Mapping[str, Any],
    labels: Tensor,
    *,
    largest: float = 0.1,
    scale: float = 0.2,
    draw: torch.Generator | None = None,
) -> Tensor:
    """Return the weighted cross-entropy of the backbone's head after every layer.

    inputs: of the model; layers are dropped in its pass, row by row. labels: the next token of each
    column [B, T], -100 where there is none. largest: `dropout_rates`. scale: `loss_weights`.
    """
    states: list[Tensor] = []
    rates = dropout_rates(backbone.depth, largest)

    def drop(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            new, old = output[0] if isinstance(output, tuple) else output, args[0]
            kept = torch.rand(len(old), 1, 1, generator=draw).to(old.device) >= rates[index]
            states.append(torch.where(kept, new, old))
            return (states[-1], *output[1:]) if isinstance(output, tuple) else states[-1]

        return hook

    with ExitStack() as stack:
        for index, layer in enumerate(backbone.layers):
            stack.callback(layer.register_forward_hook(drop(index)).remove)
        backbone.model(**inputs, use_cache=False)
    read = [backbone.logits(backbone.final_norm(state)).flatten(0, 1) for state in states]
    losses = [F.cross_entropy(logits, labels.flatten()) for logits in read]
    weights = loss_weights(backbone.depth, scale)
    return torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)]).sum()
