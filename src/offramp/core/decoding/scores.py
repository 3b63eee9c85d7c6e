"""Scores of one exit's logits, in float32, where entropy cannot become NaN.

It imports nothing of offramp, so that the plug-in of vLLM, whose wheel has a copy, scores by the
same code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor  # policies are read where there is no PyTorch


def max_probability(logits: Tensor) -> Tensor:
    """The largest probability [B] of logits [B, V]."""
    return logits.float().softmax(-1).amax(-1)


def margin(logits: Tensor) -> Tensor:
    """The largest minus the second largest probability [B] of logits [B, V]."""
    top = logits.float().softmax(-1).topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]


def entropy(logits: Tensor) -> Tensor:
    """1 - H(p) / log V [B] of logits [B, V]: 1 when certain, 0 when uniform."""
    log_p = logits.float().log_softmax(-1)
    # p = 0 gives log p = -inf and 0 * -inf = NaN; its true contribution to the entropy is 0.
    terms = (log_p.exp() * log_p).masked_fill(log_p.isneginf(), 0.0)
    return (1.0 + terms.sum(-1) / math.log(logits.shape[-1])).clamp(0.0, 1.0)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "max_probability": max_probability,
    "margin": margin,
    "entropy": entropy,
}
"""Scores [B] of one exit's logits [B, V] by name."""
