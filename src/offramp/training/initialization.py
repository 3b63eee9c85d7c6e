"""What an exit is before its first step: a copy of the decoder layer that fits its place best.

The layer right behind an exit knows the states that come there, but not the final layer's features;
a deeper one knows those features, but not those states. What each makes of the states that come is
measured by a linear probe (Alain and Bengio 2017): how closely a linear map of its output gives the
final layer's features, which is what training then has to learn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from offramp.engine.teacher_forcing import Batch
from offramp.models.weights import float_state
from offramp.training.adversarial import AdversarialObjective
from offramp.training.losses import kl

RIDGE = 0.01  # of the features' mean variance


@torch.no_grad()
def start_closest(
    objective: AdversarialObjective,
    batches: Sequence[Batch],
    *,
    agreed: Callable[[Tensor], float] = float,
    progress: Any = iter,
) -> dict[int, int]:
    """Give each exit the weights of a decoder layer behind it; which (from 0), by depth.

    Of the layers whose parameters fit, the one with the least KL(final || probe) at answer tokens:
    each one's probe is fitted on three quarters of the batches and judged on the others. Where no
    KL is finite, the layer right behind.

    agreed: the mean of a value over all processes, which must choose alike.
    """
    layers, exits = objective.backbone.layers, objective.exits
    weights = {i: partial(float_state, layer) for i, layer in enumerate(layers)}
    judged = batches[::4]
    learnt = [batch for n, batch in enumerate(batches) if n % 4] or judged
    distances: dict[int, dict[int, float]] = {depth: {} for depth in exits.depths}
    for behind in progress(range(len(layers) - exits.depths[0])):
        candidates = {
            d: d + behind
            for d in exits.depths
            if d + behind in weights and _fits(weights[d + behind](), exits.at(d))
        }
        for depth, layer in candidates.items():
            exits.at(depth).load_state_dict(weights[layer]())
        distance_at = _probed(objective, learnt, judged) if candidates else {}
        for depth, layer in candidates.items():
            distance = agreed(distance_at[depth])
            distances[depth][layer] = distance if math.isfinite(distance) else math.inf
    chosen = {
        depth: min(by_layer, key=lambda i: by_layer[i]) for depth, by_layer in distances.items()
    }
    for depth, layer in chosen.items():
        exits.at(depth).load_state_dict(weights[layer]())
    return chosen


def _probed(
    objective: AdversarialObjective, learnt: Sequence[Batch], judged: Sequence[Batch]
) -> dict[int, Tensor]:
    """KL(final || probe) of the exits as they are, by depth: the mean over `judged`'s tokens."""
    (states, final), (others, target) = _features(objective, learnt), _features(objective, judged)
    wanted = objective.logits(target).float()
    distances = {}
    for depth in objective.exits.depths:
        probe = linear_probe(states[depth], final)
        said = objective.logits(probe(others[depth]).to(target.dtype)).float()
        distances[depth] = kl(wanted, said).mean()
    return distances


def _features(
    objective: AdversarialObjective, batches: Sequence[Batch]
) -> tuple[dict[int, Tensor], Tensor]:
    """Features [N, D] of the exits by depth, and of the final layer, at all answer tokens."""
    exits = [objective.features(batch) for batch in batches]
    masks = [batch.mask for batch in batches]
    return {
        depth: torch.cat(
            [features[depth][mask] for features, mask in zip(exits, masks, strict=True)]
        )
        for depth in objective.exits.depths
    }, torch.cat([batch.teacher[batch.mask] for batch in batches])


def linear_probe(states: Tensor, final: Tensor) -> Callable[[Tensor], Tensor]:
    """The affine map that takes `states` [N, D] closest to `final` [N, D] in least squares, with a
    ridge of `RIDGE`; it maps [M, D] to [M, D] in float32.
    """
    states, final = states.float(), final.float()
    middle, target = states.mean(0), final.mean(0)
    centred = states - middle
    gram = centred.T @ centred
    gram.diagonal().add_(RIDGE * gram.diagonal().mean() + 1e-6)
    slope = torch.linalg.solve(gram, centred.T @ (final - target))
    return lambda others: (others.float() - middle) @ slope + target


def _fits(weights: Mapping[str, Tensor], exit: nn.Module) -> bool:
    """Whether an exit can take these weights: families may mix layers of several kinds."""
    own = exit.state_dict()
    return weights.keys() == own.keys() and all(
        weights[name].shape == own[name].shape for name in own
    )
