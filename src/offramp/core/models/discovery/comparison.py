"""How far two results of a model are apart: the one comparison of all checks."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference of two tensors, over the largest of `theirs`.

    Logits of forbidden tokens, which models and processors set to the lowest number or -inf, must
    be forbidden in both, and are ignored otherwise. Infinite where they or the shapes differ, or
    one value alone is NaN.
    """
    a, b = ours.to(theirs.device).double(), theirs.double()
    low = max(-1e30, torch.finfo(theirs.dtype).min / 2)
    never = b <= low
    if not torch.equal(never, a <= low) or not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    counts = ~never & ~b.isnan()
    if not bool(counts.any()):
        return 0.0
    difference = float((a - b)[counts].abs().max())
    return difference / max(float(b[counts].abs().max()), 1e-30)
