"""What a discriminator sees, and what it does not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offramp.training.discriminator import Discriminator, build_discriminators

N, D = 7, 6


def states(scale: float = 1.0) -> tuple[Tensor, Tensor]:
    features, entries = torch.randn(2, N, D) * scale
    return features, entries


def slow_logit(d: Discriminator, feature: Tensor, entry: Tensor) -> float:
    """The verdict on a token, sum by sum."""

    def norm(layer: Any, x: list[float]) -> list[float]:
        mean = sum(x) / len(x)
        spread = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + layer.eps)
        weights, biases = layer.weight.tolist(), layer.bias.tolist()
        return [(v - mean) / spread * w + b for v, w, b in zip(x, weights, biases, strict=True)]

    def linear(layer: Any, x: list[float]) -> list[float]:
        pairs = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
        return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in pairs]

    def bend(x: list[float]) -> list[float]:
        return [v if v >= 0 else 0.2 * v for v in x]

    inner, outer, head = (layer for layer in d.modules() if isinstance(layer, nn.Linear))
    both = norm(d.feature_norm, feature.tolist()) + norm(d.entry_norm, entry.tolist())
    return linear(head, bend(linear(outer, bend(linear(inner, both)))))[0]


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_the_logits_match_a_slow_loop(scale: float) -> None:
    one, (features, entries) = Discriminator(D, hidden=5), states(scale)
    slow = [slow_logit(one, *pair) for pair in zip(features, entries, strict=True)]
    found = one(features, entries).detach()
    torch.testing.assert_close(found, torch.tensor(slow), rtol=1e-5, atol=1e-5)


def test_each_token_is_judged_by_itself_and_by_the_state_that_entered() -> None:
    one, (features, entries) = Discriminator(D), states()
    before = one(features, entries)
    changed = features.clone()
    changed[0] = torch.randn(D)  # a constant shift is what a layer norm takes away again
    assert torch.equal(one(changed, entries) != before, torch.arange(N) == 0)
    assert not torch.equal(one(features, torch.randn(N, D)), before)


def test_each_depth_has_a_discriminator_of_its_own() -> None:
    some = build_discriminators(D, (2, 4))
    assert list(some) == ["2", "4"]
    assert not {id(p) for p in some["2"].parameters()} & {id(p) for p in some["4"].parameters()}
