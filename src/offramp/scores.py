"""Confidence scores: how safe it is to leave at an exit. In [0, 1], larger is safer.

One direction, always: a token leaves iff `score >= threshold`. Every score is computed in float32,
where entropy cannot become NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from offramp.errors import InputError, did_you_mean


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
    terms = torch.where(log_p.isneginf(), 0.0, log_p.exp() * log_p)
    return (1.0 + terms.sum(-1) / math.log(logits.shape[-1])).clamp(0.0, 1.0)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "max_probability": max_probability,
    "margin": margin,
    "entropy": entropy,
}
"""Scores of logits by name; "discriminator" is the one that reads features instead."""

SCORE_NAMES = (*SCORES, "discriminator")


def check_score(name: str) -> str:
    """`name`, or `InputError` with the names there are; scores added to `SCORES` are known too."""
    if name not in SCORES and name != "discriminator":
        raise InputError(
            f"Score {name!r} is not known.", did_you_mean(str(name), (*SCORES, "discriminator"))
        )
    return name


def check_thresholds(thresholds: dict[int, float], depths: tuple[int, ...]) -> dict[int, float]:
    """`thresholds` by depth; raise `InputError` for a depth without an exit or a value off [0, 1].

    A depth left out, or None, is an exit switched off: it is not even computed.
    """
    wrong = [d for d in thresholds if d not in depths]
    if wrong:
        raise InputError(
            f"Thresholds name depths {wrong}, where no exit stands.",
            f"Exits stand at {list(depths)}.",
        )
    on = {d: _number(t) for d, t in sorted(thresholds.items()) if t is not None}
    off = {d: thresholds[d] for d, t in on.items() if not 0.0 <= t <= 1.0}
    if off:
        raise InputError(
            f"Thresholds {off} are outside [0, 1].",
            "Give numbers from 0 (always leave) to 1, or None to switch an exit off.",
        )
    return on


def _number(value: object) -> float:
    """`value` as a float, NaN where it is no number, which is in no range."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan
