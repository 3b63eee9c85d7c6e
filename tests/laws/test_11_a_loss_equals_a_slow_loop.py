"""Law 11: every loss equals a slow loop, in value and gradient, on plain, masked and saturated
inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from offramp.models.discriminator import Discriminator, Verdict
from offramp.training.config import ADVERSARY_NAMES, GAMES, OBJECTIVES
from offramp.training.losses import ADVERSARIES, LOSSES, LossInputs, gradient_penalty

N, V, D, H = 7, 11, 6, 4
KINDS = ("plain", "masked", "saturated", "half")
MAP = [[1, -1, 1, 1, -1, 1], [1, 1, -1, 1, 1, 1], [-1, 1, 1, -1, 1, 1], [1, 1, 1, 1, 1, -1]]


def judge(features: Tensor) -> Verdict:
    """A linear discriminator: hidden features by `MAP` [H, D], and their sum."""
    hidden = features.float() @ torch.tensor(MAP).float().T
    return Verdict(hidden.sum(-1), hidden)


def terms(kind: str, temperature: float = 1.0, adversary: str = "logistic") -> LossInputs:
    """Seven tokens; "masked" has unlabelled ones, "saturated" logits and features of +-1e4, and
    "half" such logits."""
    dtype = torch.float16 if kind == "half" else torch.float32

    def draw(width: int, saturated: bool) -> Tensor:
        plain = torch.randn(2, N, width)
        return (plain.sign() * 1e4 if saturated else plain * 3).to(dtype)

    logits, teacher_logits = draw(V, kind in ("saturated", "half"))
    features, teacher_features = draw(D, kind == "saturated")
    return LossInputs(
        logits=logits.requires_grad_(True),
        teacher_logits=teacher_logits,
        features=features.requires_grad_(True),
        teacher_features=teacher_features,
        targets=torch.randint(0, V, (N,)),
        labelled=(torch.arange(N) % 2).float() if kind == "masked" else torch.ones(N),
        judge=judge,
        adversary=adversary,
        temperature=temperature,
    )


def log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = top + math.log(math.fsum(math.exp(x - top) for x in row))
    return [x - total for x in row]


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def slow_distillation(t: LossInputs, i: int) -> tuple[float, list[float]]:
    teacher = log_softmax([x / t.temperature for x in t.teacher_logits[i].tolist()])
    student = log_softmax([x / t.temperature for x in t.logits[i].tolist()])
    value = math.fsum(math.exp(p) * (p - q) for p, q in zip(teacher, student, strict=True))
    slope = [
        (math.exp(q) - math.exp(p)) * t.temperature for p, q in zip(teacher, student, strict=True)
    ]
    return value * t.temperature**2, slope


def slow_cross_entropy(t: LossInputs, i: int) -> tuple[float, list[float]]:
    student, target, on = log_softmax(t.logits[i].tolist()), int(t.targets[i]), float(t.labelled[i])
    return -student[target] * on, [
        (math.exp(q) - (v == target)) * on for v, q in enumerate(student)
    ]


def states(t: LossInputs, i: int) -> tuple[list[float], list[float]]:
    return t.features[i].tolist(), t.teacher_features[i].tolist()


def slow_l2(t: LossInputs, i: int) -> tuple[float, list[float]]:
    gaps = [x - y for x, y in zip(*states(t, i), strict=True)]
    return math.fsum(gap**2 for gap in gaps) / D, [2 * gap / D for gap in gaps]


def slow_cosine(t: LossInputs, i: int) -> tuple[float, list[float]]:
    exit, final = states(t, i)
    one, other = math.hypot(*exit), math.hypot(*final)
    cos = math.fsum(x * y for x, y in zip(exit, final, strict=True)) / (one * other)
    return 1 - cos, [cos * x / one**2 - y / (one * other) for x, y in zip(exit, final, strict=True)]


def slow_hidden(state: list[float]) -> list[float]:
    return [math.fsum(w * x for w, x in zip(row, state, strict=True)) for row in MAP]


def slow_feature_matching(t: LossInputs, i: int) -> tuple[float, list[float]]:
    exit, final = (slow_hidden(state) for state in states(t, i))
    gaps = [x - y for x, y in zip(exit, final, strict=True)]
    slopes = [
        2 / H * math.fsum(g * row[d] for g, row in zip(gaps, MAP, strict=True)) for d in range(D)
    ]
    return math.fsum(gap**2 for gap in gaps) / H, slopes


def slow_adversarial(t: LossInputs, i: int) -> tuple[float, list[float]]:
    exit, final = (math.fsum(slow_hidden(state)) for state in states(t, i))
    value, slope = {
        "logistic": (softplus(-exit), -sigmoid(-exit)),
        "hinge": (-exit, -1.0),
        "relativistic": (softplus(final - exit), -sigmoid(final - exit)),
    }[t.adversary]
    return value, [slope * sum(row[d] for row in MAP) for d in range(D)]


def slow_discriminator(adversary: str, final: float, exit: float) -> tuple[float, float, float]:
    """The value, and its slopes in both logits."""
    return {
        "logistic": (softplus(-final) + softplus(exit), -sigmoid(-final), sigmoid(exit)),
        "hinge": (max(0, 1 - final) + max(0, 1 + exit), -float(final < 1), float(exit > -1)),
        "relativistic": (softplus(exit - final), -sigmoid(exit - final), sigmoid(exit - final)),
    }[adversary]


SLOW: dict[str, Callable[[LossInputs, int], tuple[float, list[float]]]] = {
    "distillation": slow_distillation,
    "cross_entropy": slow_cross_entropy,
    "l2": slow_l2,
    "cosine": slow_cosine,
    "adversarial": slow_adversarial,
    "feature_matching": slow_feature_matching,
}
CASES = [(name, "logistic") for name in SLOW] + [
    ("adversarial", name) for name in ADVERSARIES if name != "logistic"
]


def near(found: Tensor, wanted: Any, half: bool = False) -> None:
    assert torch.isfinite(found).all()
    tolerance = 2e-3 if half else 1e-5
    torch.testing.assert_close(
        found.double(), torch.tensor(wanted).double(), rtol=tolerance, atol=tolerance
    )


def test_what_can_be_asked_for_is_what_there_is() -> None:
    assert tuple(SLOW) == tuple(LOSSES) == OBJECTIVES
    assert tuple(ADVERSARIES) == ADVERSARY_NAMES


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "adversary"), CASES)
def test_a_loss_matches_its_slow_loop_in_value_and_gradient(
    name: str, adversary: str, kind: str, temperature: float
) -> None:
    t = terms(kind, temperature, adversary)
    values = LOSSES[name](t)
    values.sum().backward()
    moved = t.logits if name in ("distillation", "cross_entropy") else t.features
    assert moved.grad is not None
    slow = [SLOW[name](t, i) for i in range(N)]
    near(values.detach(), [value for value, _ in slow])
    near(moved.grad, [slope for _, slope in slow], half=kind == "half")


@pytest.mark.parametrize("scale", [1.0, 3.0, 1e4])
@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_a_discriminator_loss_matches_its_slow_loop(adversary: str, scale: float) -> None:
    final, exit = (torch.randn(2, N) * scale).requires_grad_(True).unbind()
    final.retain_grad()
    exit.retain_grad()
    values = ADVERSARIES[adversary].discriminator(final, exit)
    values.sum().backward()
    pairs = zip(final.tolist(), exit.tolist(), strict=True)
    slow = [slow_discriminator(adversary, *pair) for pair in pairs]
    near(torch.stack([values.detach(), final.grad, exit.grad]).T, slow)  # type: ignore[list-item]


@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_where_nothing_tells_the_two_apart_each_player_pulls_its_own_way(adversary: str) -> None:
    t = terms("plain", adversary=adversary)
    same = 0.1 * t.teacher_features  # verdicts near 0
    t = replace(t, features=same.clone().requires_grad_(True), teacher_features=same)
    LOSSES["adversarial"](t).sum().backward()
    assert t.features.grad is not None
    stepped = t.judge(t.features - 0.01 * t.features.grad).logits  # type: ignore[misc]
    assert (stepped > t.verdict.logits).all()
    alike = torch.zeros(2, N, requires_grad=True)
    ADVERSARIES[adversary].discriminator(*alike).sum().backward()
    assert alike.grad is not None
    assert (alike.grad[0] < 0).all() and (alike.grad[1] > 0).all()


@pytest.mark.parametrize("name", GAMES)
@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_the_final_layer_is_a_constant_in_the_games(name: str, adversary: str) -> None:
    t = terms("plain", adversary=adversary)
    t.teacher_features.requires_grad_(True)
    LOSSES[name](t).sum().backward()
    assert t.teacher_features.grad is None


@pytest.mark.parametrize("conditional", [True, False])
def test_the_gradient_penalty_is_that_of_finite_differences(conditional: bool) -> None:
    one = Discriminator(D, conditional=conditional, hidden=5).double()
    features, entries = torch.randn(2, N, D, dtype=torch.float64)
    step = 1e-6 * torch.eye(D, dtype=torch.float64)

    def slow() -> Tensor:
        up, down = (
            torch.stack([one(features + sign * along, entries) for along in step], -1)
            for sign in (1, -1)
        )
        return ((up - down) / 2e-6).square().sum(-1) / 2

    here = features.clone().requires_grad_(True)
    values = gradient_penalty(one(here, entries), here)
    torch.testing.assert_close(values.detach(), slow().detach(), rtol=1e-6, atol=1e-9)
    moved = [one.net[0].weight, one.net[4].weight, one.feature_norm.weight]
    found = torch.autograd.grad(values.sum(), moved)
    wanted = torch.autograd.grad(slow().sum(), moved)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_cross_entropy_is_0_on_unlabelled_tokens() -> None:
    t = terms("masked")
    values = LOSSES["cross_entropy"](t)
    assert (values[t.labelled == 0] == 0).all() and (values[t.labelled == 1] > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_distillation_is_never_negative(kind: str) -> None:
    assert (LOSSES["distillation"](terms(kind)) >= -1e-6).all()


def test_distillation_is_0_exactly_where_exit_and_teacher_agree_up_to_a_constant() -> None:
    t = terms("plain")
    same = replace(t, logits=t.teacher_logits + 3.0)
    assert LOSSES["distillation"](same).abs().max() < 1e-6
    assert (LOSSES["distillation"](t) > 1e-2).all()


@pytest.mark.parametrize("name", ["l2", "cosine", "feature_matching"])
def test_a_distance_of_features_is_0_exactly_where_they_are_the_final_layers(name: str) -> None:
    t = terms("plain")
    assert LOSSES[name](replace(t, features=t.teacher_features)).abs().max() < 1e-6
    assert (LOSSES[name](t) > 1e-2).all()


def test_only_the_cosine_does_not_see_how_long_a_state_is() -> None:
    t = terms("plain")
    longer = replace(t, features=t.teacher_features * 2)
    assert LOSSES["cosine"](longer).abs().max() < 1e-6
    assert (LOSSES["l2"](longer) > 1e-2).all()
