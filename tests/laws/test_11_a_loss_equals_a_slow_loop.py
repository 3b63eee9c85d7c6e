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

from offramp.training.config import OBJECTIVES
from offramp.training.losses import LOSSES, LossInputs, discriminator_loss

N, V, D = 7, 11, 6
KINDS = ("plain", "masked", "saturated", "half")
MAP = [[1, -1, 1, 1, -1, 1], [1, 1, -1, 1, 1, 1], [-1, 1, 1, -1, 1, 1], [1, 1, 1, 1, 1, -1]]


def judge(features: Tensor) -> Tensor:
    """A linear discriminator: the sum of four hidden features by `MAP` [4, D]."""
    return (features.float() @ torch.tensor(MAP).float().T).sum(-1)


def terms(kind: str, temperature: float = 1.0) -> LossInputs:
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


def slow_adversarial(t: LossInputs, i: int) -> tuple[float, list[float]]:
    exit, _ = states(t, i)
    columns = [sum(row[d] for row in MAP) for d in range(D)]
    logit = math.fsum(w * x for w, x in zip(columns, exit, strict=True))
    return softplus(-logit), [-sigmoid(-logit) * w for w in columns]


def slow_discriminator(final: float, exit: float) -> tuple[float, float, float]:
    """The value, and its slopes in both logits."""
    return softplus(-final) + softplus(exit), -sigmoid(-final), sigmoid(exit)


SLOW: dict[str, Callable[[LossInputs, int], tuple[float, list[float]]]] = {
    "distillation": slow_distillation,
    "cross_entropy": slow_cross_entropy,
    "l2": slow_l2,
    "cosine": slow_cosine,
    "adversarial": slow_adversarial,
}


def near(found: Tensor, wanted: Any, half: bool = False) -> None:
    assert torch.isfinite(found).all()
    tolerance = 2e-3 if half else 1e-5
    torch.testing.assert_close(
        found.double(), torch.tensor(wanted).double(), rtol=tolerance, atol=tolerance
    )


def test_what_can_be_asked_for_is_what_there_is() -> None:
    assert tuple(SLOW) == tuple(LOSSES) == OBJECTIVES


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SLOW)
def test_a_loss_matches_its_slow_loop_in_value_and_gradient(
    name: str, kind: str, temperature: float
) -> None:
    t = terms(kind, temperature)
    values = LOSSES[name](t)
    values.sum().backward()
    moved = t.logits if name in ("distillation", "cross_entropy") else t.features
    assert moved.grad is not None
    slow = [SLOW[name](t, i) for i in range(N)]
    near(values.detach(), [value for value, _ in slow])
    near(moved.grad, [slope for _, slope in slow], half=kind == "half")


@pytest.mark.parametrize("scale", [1.0, 3.0, 1e4])
def test_a_discriminator_loss_matches_its_slow_loop(scale: float) -> None:
    final, exit = (torch.randn(2, N) * scale).requires_grad_(True).unbind()
    final.retain_grad()
    exit.retain_grad()
    values = discriminator_loss(final, exit)
    values.sum().backward()
    pairs = zip(final.tolist(), exit.tolist(), strict=True)
    slow = [slow_discriminator(*pair) for pair in pairs]
    near(torch.stack([values.detach(), final.grad, exit.grad]).T, slow)  # type: ignore[list-item]


def test_where_nothing_tells_the_two_apart_each_player_pulls_its_own_way() -> None:
    t = terms("plain")
    same = 0.1 * t.teacher_features  # verdicts near 0
    t = replace(t, features=same.clone().requires_grad_(True), teacher_features=same)
    LOSSES["adversarial"](t).sum().backward()
    assert t.features.grad is not None
    stepped = judge(t.features - 0.01 * t.features.grad)
    assert (stepped > judge(t.features)).all()
    alike = torch.zeros(2, N, requires_grad=True)
    discriminator_loss(*alike).sum().backward()
    assert alike.grad is not None
    assert (alike.grad[0] < 0).all() and (alike.grad[1] > 0).all()


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


@pytest.mark.parametrize("name", ["l2", "cosine"])
def test_a_distance_of_features_is_0_exactly_where_they_are_the_final_layers(name: str) -> None:
    t = terms("plain")
    assert LOSSES[name](replace(t, features=t.teacher_features)).abs().max() < 1e-6
    assert (LOSSES[name](t) > 1e-2).all()


def test_only_the_cosine_does_not_see_how_long_a_state_is() -> None:
    t = terms("plain")
    longer = replace(t, features=t.teacher_features * 2)
    assert LOSSES["cosine"](longer).abs().max() < 1e-6
    assert (LOSSES["l2"](longer) > 1e-2).all()
