"""A shortlist of the vocabulary: what exits can say.

Over a large vocabulary one LM head costs as much as several decoder layers. A shortlist holds the
tokens that the task's own answers are made of; an exit that reads only their rows of the head can
say nothing else, and how often that would be wrong is bounded from held-out answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from offramp.core.errors import InputError
from offramp.core.models.backbone import Backbone

USUAL = 2048
"""Tokens of a shortlist that nobody gave a size."""
MISSED = 0.05
"""The share of held-out tokens above which such a shortlist is not used."""


def places_of(ids: Tensor, vocabulary: int) -> Tensor:
    """Return the place of each token [V] in a shortlist of ids [S]; -1 for tokens outside it."""
    places = ids.new_full((vocabulary,), -1)
    places[ids] = torch.arange(len(ids), device=ids.device)
    return places


def usual_size(backbone: Backbone) -> int | None:
    """Return how many tokens exits should read; None: the whole vocabulary.

    A shortlist pays where the vocabulary is several times as large and the LM head weighs more than
    two layers.
    """
    layer = sum(parameter.numel() for parameter in backbone.layers[0].parameters())
    wide = backbone.vocabulary * backbone.width > 2 * layer
    return USUAL if wide and backbone.vocabulary >= 4 * USUAL else None


def shortlist_of(
    answers: Sequence[Sequence[int]],
    held_out: Sequence[Sequence[int]],
    size: int,
    *,
    confidence: float = 0.95,
) -> tuple[Tensor, dict[str, Any]]:
    """Return the `size` most frequent tokens of `answers`, and how often they miss a token of
    `held_out`.

    The bound is Clopper and Pearson's (1934), over tokens, for answers drawn like the held-out
    ones. Tokens of one answer are not independent, so the bound is a guide; the guarantee about
    whole answers is that of calibration, in which every miss counts as a difference.

    Returns ids [S], ascending, and `tokens`, `missed`, `miss_rate`, `miss_bound`, `confidence`.

    Raises:
        InputError: no answers on one of the sides, or a size below 2.
    """
    from scipy.stats import beta

    counts = Counter(i for ids in answers for i in ids)
    spoken = [i for ids in held_out for i in ids]
    if size < 2 or not counts or not spoken:
        raise InputError(
            f"A shortlist of {size} tokens cannot be made from {len(answers)} answers, with "
            f"{len(held_out)} held out.",
            "Ask for at least 2 tokens, and give answers of at least two images.",
        )
    ids = sorted(token for token, _ in counts.most_common(size))
    known = set(ids)
    missed = sum(token not in known for token in spoken)
    n = len(spoken)
    bound = 1.0 if missed == n else float(beta.ppf(confidence, missed + 1, n - missed))
    return torch.tensor(ids), {
        "size": len(ids),
        "tokens": n,
        "missed": missed,
        "miss_rate": missed / n,
        "miss_bound": bound,
        "confidence": confidence,
    }
