"""What lossless decoding by a plain exit takes, by the cost model."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from offramp.calibration.cost_model import Costs, head_seconds, layer_seconds
from offramp.errors import InputError


def rounds_seconds(costs: Costs, depth: int, drafted: ArrayLike) -> float:
    """Seconds of lossless rounds with so many drafts each, written by one exit at `depth`.

    A round runs its drafts and one token more up to the exit, which looks at each, and all of them
    deeper at once.
    """
    drafts = np.asarray(drafted, dtype=float)
    positions = drafts + 1
    shallow = costs.token + depth * costs.layer[0] + costs.exit + costs.check
    deep = (costs.layers - depth) * layer_seconds(costs, positions) + head_seconds(costs, positions)
    return float((positions * shallow + costs.reenter + deep).sum())


def predict_lossless(
    costs: Costs, depth: int, *, acceptance: float, sure: float = 1.0, max_draft: int = 8
) -> float:
    """Seconds per token of lossless decoding with one exit at `depth`.

    sure: share of tokens for which the exit's score passes the draft threshold. acceptance: share
    of those on which the full model agrees. With g drafts a round writes
    (1 - a^(g+1)) / (1 - a) tokens on average (Leviathan et al. 2023).

    Raises:
        InputError: a value out of range.
    """
    shares = 0 <= acceptance <= 1 and 0 <= sure <= 1
    if not (shares and 1 <= depth < costs.layers and max_draft > 0):
        raise InputError(
            f"An exit at {depth} of {costs.layers} layers, with a share of {sure} that is drafted, "
            f"{acceptance} of it accepted, and at most {max_draft} drafts, is none.",
            "Give shares from 0 to 1, a depth before the last layer and at least one draft.",
        )
    lengths = np.arange(max_draft + 1)
    share = sure**lengths * np.where(lengths < max_draft, 1.0 - sure, 1.0)
    written = np.array([(acceptance ** np.arange(g + 1)).sum() for g in lengths])
    rounds = [rounds_seconds(costs, depth, g) for g in lengths]
    return float((share * rounds).sum() / (share * written).sum())


def best_draft(
    costs: Costs, depth: int, *, acceptance: float, sure: float = 1.0, longest: int = 16
) -> int:
    """The `max_draft` from 1 to `longest` that `predict_lossless` finds fastest."""
    return min(
        range(1, longest + 1),
        key=lambda g: predict_lossless(costs, depth, acceptance=acceptance, sure=sure, max_draft=g),
    )
