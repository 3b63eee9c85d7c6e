"""What a discriminator sees, and what it does not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offramp.errors import InputError
from offramp.models import JUDGED
from offramp.models.discriminator import Discriminator, build_discriminators

N, D = 7, 6
ROWS = torch.tensor([0, 0, 0, 2, 2, 3, 3])
"""Answers of three tokens, two and two; one that was asked for has none."""


def states(scale: float = 1.0) -> tuple[Tensor, Tensor]:
    features, entries = torch.randn(2, N, D) * scale
    return features, entries


def linear_maps(one: nn.Module) -> list[Any]:
    return [layer for layer in one.modules() if isinstance(layer, nn.Linear)]


# -- what it computes -------------------------------------------------------------------------


def slow_logit(d: Discriminator, tokens: list[tuple[Tensor, Tensor]]) -> float:
    """The verdict on an answer, sum by sum."""

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

    inner, outer, head = linear_maps(d)
    seen = []
    for feature, entry in tokens:
        both = norm(d.feature_norm, feature.tolist())
        if d.entry_norm is not None:
            both += norm(d.entry_norm, entry.tolist())
        seen.append(bend(linear(inner, both)))
    mean = [sum(column) / len(column) for column in zip(*seen, strict=True)]
    return linear(head, bend(linear(outer, mean)))[0]


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("judged", JUDGED)
@pytest.mark.parametrize("conditional", [True, False])
def test_the_verdicts_match_a_slow_loop(conditional: bool, judged: str, scale: float) -> None:
    one = Discriminator(D, conditional=conditional, judged=judged, hidden=5)
    features, entries = states(scale)
    tokens = list(zip(features, entries, strict=True))
    answers = [
        [t for t, row in zip(tokens, ROWS, strict=True) if row == ROWS[i]]
        if judged == "sequence"
        else [tokens[i]]
        for i in range(N)
    ]
    slow = torch.tensor([slow_logit(one, answer) for answer in answers])
    torch.testing.assert_close(one(features, entries, ROWS).detach(), slow, rtol=1e-5, atol=1e-5)


def test_logits_are_read_from_the_hidden_features() -> None:
    one = Discriminator(D)
    verdict = one.judge(*states())
    assert torch.equal(one.net[-1](verdict.hidden)[:, 0], verdict.logits)


@pytest.mark.parametrize("conditional", [True, False])
def test_only_a_conditional_discriminator_looks_at_the_entry_state(conditional: bool) -> None:
    one, (features, entries) = Discriminator(D, conditional=conditional), states()
    moved = not torch.equal(one(features, entries), one(features, torch.randn(N, D)))
    assert moved is conditional


# -- whole answers ----------------------------------------------------------------------------


@pytest.mark.parametrize("judged", JUDGED)
def test_a_verdict_depends_on_its_own_answer_or_on_its_own_token(judged: str) -> None:
    one, (features, entries) = Discriminator(D, judged=judged), states()
    before = one(features, entries, ROWS)
    changed = features.clone()
    changed[0] = torch.randn(D)  # a constant shift is what a layer norm takes away again
    moved = one(changed, entries, ROWS) != before
    assert torch.equal(moved, ROWS == 0 if judged == "sequence" else torch.arange(N) == 0)


def test_tokens_of_an_answer_share_its_verdict_in_any_order() -> None:
    one, (features, entries) = Discriminator(D, judged="sequence"), states()
    verdicts = one(features, entries, ROWS)
    assert len(set(verdicts.tolist())) == len(set(ROWS.tolist()))
    order = torch.randperm(N)
    shuffled = one(features[order], entries[order], ROWS[order])
    torch.testing.assert_close(shuffled, verdicts[order])


@pytest.mark.parametrize("judged", JUDGED)
def test_a_lone_token_is_judged_as_an_answer_of_one(judged: str) -> None:
    one, (features, entries) = Discriminator(D, judged=judged), states()
    verdicts = one(features, entries)
    assert torch.equal(verdicts, one(features, entries, torch.arange(N)))
    alone = torch.cat([one(f[None], e[None]) for f, e in zip(features, entries, strict=True)])
    torch.testing.assert_close(verdicts, alone)


# -- spectral norm ----------------------------------------------------------------------------


def test_spectral_norm_holds_every_linear_map_at_lipschitz_1() -> None:
    free, bound = (Discriminator(D, spectral_norm=on, hidden=32) for on in (False, True))
    for one in (free, bound):
        with torch.no_grad():
            for parameter in one.parameters():
                parameter.mul_(4.0)
        for _ in range(50):
            one(*states())  # training mode: the power iteration follows the weights
        one.eval()
    for layer in linear_maps(bound):
        assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1.0, abs=0.02)
    assert any(torch.linalg.matrix_norm(layer.weight, 2) > 1.5 for layer in linear_maps(free))


@pytest.mark.parametrize("training", [True, False])
def test_the_power_iteration_moves_in_training_only(training: bool) -> None:
    one = Discriminator(D, spectral_norm=True).train(training)
    before = {name: tensor.clone() for name, tensor in one.named_buffers()}
    verdicts = [one(*states()) for _ in range(3)]
    assert before and all(v.isfinite().all() for v in verdicts)
    still = [torch.equal(before[name], tensor) for name, tensor in one.named_buffers()]
    assert all(still) is not training


# -- building ---------------------------------------------------------------------------------


def test_each_depth_has_a_discriminator_of_its_own() -> None:
    some = build_discriminators(D, (2, 4), conditional=True)
    assert list(some) == ["2", "4"]
    assert not {id(p) for p in some["2"].parameters()} & {id(p) for p in some["4"].parameters()}


def test_its_options_build_it_again() -> None:
    options: dict[str, Any] = {"conditional": False, "spectral_norm": True, "judged": "sequence"}
    one = Discriminator(D, **options)
    assert one.options == options
    again = Discriminator(D, **one.options).eval()
    again.load_state_dict(one.eval().state_dict())
    features, entries = states()
    assert torch.equal(one(features, entries, ROWS), again(features, entries, ROWS))


def test_an_unknown_thing_to_judge_is_refused() -> None:
    with pytest.raises(InputError, match="Did you mean 'sequence'"):
        Discriminator(D, judged="sequences")
