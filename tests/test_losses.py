"""Law 11: every loss is what a slow loop says, in value and in gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from offramp.discriminator import Discriminator, build_discriminators
from offramp.losses import LOSSES, Terms, discriminator_loss, masked_mean

N, V, D = 7, 11, 6
KINDS = ("plain", "masked", "saturated", "half")


def terms(kind: str, temperature: float = 1.0) -> Terms:
    """Seven tokens; "masked" has unlabelled ones, "saturated" and "half" logits of +-1e4."""
    scale = 1e4 if kind in ("saturated", "half") else 3.0
    signs = torch.randn(2, N, V).sign() if scale == 1e4 else torch.randn(2, N, V)
    logits, teacher = (signs * scale).to(torch.float16 if kind == "half" else torch.float32)
    labelled = (torch.arange(N) % 2).float() if kind == "masked" else torch.ones(N)
    judged = torch.randn(N) * scale
    return Terms(
        logits.requires_grad_(True),
        teacher,
        torch.randn(N, D),
        torch.randn(N, D),
        torch.randint(0, V, (N,)),
        labelled,
        judged.requires_grad_(True),
        temperature,
    )


def log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = top + math.log(math.fsum(math.exp(x - top) for x in row))
    return [x - total for x in row]


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def slow_distillation(t: Terms, i: int) -> tuple[float, list[float]]:
    teacher = log_softmax([x / t.temperature for x in t.teacher_logits[i].tolist()])
    student = log_softmax([x / t.temperature for x in t.logits[i].tolist()])
    value = math.fsum(math.exp(p) * (p - q) for p, q in zip(teacher, student, strict=True))
    slope = [
        (math.exp(q) - math.exp(p)) * t.temperature for p, q in zip(teacher, student, strict=True)
    ]
    return value * t.temperature**2, slope


def slow_cross_entropy(t: Terms, i: int) -> tuple[float, list[float]]:
    student, target, on = log_softmax(t.logits[i].tolist()), int(t.targets[i]), float(t.labelled[i])
    return -student[target] * on, [
        (math.exp(q) - (v == target)) * on for v, q in enumerate(student)
    ]


def slow_adversarial(t: Terms, i: int) -> tuple[float, list[float]]:
    assert t.judged is not None
    judged = t.judged[i].item()
    return softplus(-judged), [-sigmoid(-judged)]


SLOW: dict[str, Callable[[Terms, int], tuple[float, list[float]]]] = {
    "distillation": slow_distillation,
    "cross_entropy": slow_cross_entropy,
    "adversarial": slow_adversarial,
}


def near(found: Tensor, wanted: Any, half: bool = False) -> None:
    assert torch.isfinite(found).all()
    tolerance = 2e-3 if half else 1e-5
    torch.testing.assert_close(
        found.double(), torch.tensor(wanted).double(), rtol=tolerance, atol=tolerance
    )


def test_every_loss_has_a_slow_twin() -> None:
    assert set(SLOW) == set(LOSSES)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SLOW)
def test_a_loss_matches_its_slow_loop_in_value_and_gradient(
    name: str, kind: str, temperature: float
) -> None:
    t = terms(kind, temperature)
    values = LOSSES[name](t)
    values.sum().backward()
    moved = t.judged if name == "adversarial" else t.logits
    assert moved is not None and moved.grad is not None
    slow = [SLOW[name](t, i) for i in range(N)]
    near(values.detach(), [value for value, _ in slow])
    near(moved.grad.reshape(N, -1), [slope for _, slope in slow], half=kind == "half")


@pytest.mark.parametrize("scale", [3.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_discriminator_loss_matches_its_slow_loop(scale: float, dtype: torch.dtype) -> None:
    real = (torch.randn(N).sign() * scale).to(dtype).requires_grad_(True)
    fake = (torch.randn(N).sign() * scale).to(dtype).requires_grad_(True)
    values = discriminator_loss(real, fake)
    values.sum().backward()
    assert real.grad is not None and fake.grad is not None
    pairs = list(zip(real.tolist(), fake.tolist(), strict=True))
    half = dtype == torch.float16
    near(values.detach(), [softplus(-r) + softplus(f) for r, f in pairs])
    near(real.grad, [-sigmoid(-r) for r, _ in pairs], half)
    near(fake.grad, [sigmoid(f) for _, f in pairs], half)


@pytest.mark.parametrize("on", [[1, 0, 1, 1, 0, 0, 1], [1] * N, [0] * N, [0, 0, 1, 0, 0, 0, 0]])
def test_the_masked_mean_is_the_mean_of_what_is_on_and_0_where_nothing_is(on: list[int]) -> None:
    values, weights = torch.randn(N, requires_grad=True), torch.tensor(on).float()
    mean = masked_mean(values, weights)
    mean.backward()
    kept = [v for v, w in zip(values.tolist(), on, strict=True) if w]
    near(mean.detach(), sum(kept) / len(kept) if kept else 0.0)
    near(values.grad, [w / max(1, len(kept)) for w in on])  # type: ignore[arg-type]


def test_cross_entropy_is_0_on_unlabelled_tokens() -> None:
    t = terms("masked")
    values = LOSSES["cross_entropy"](t)
    assert (values[t.labelled == 0] == 0).all() and (values[t.labelled == 1] > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_distillation_is_never_negative(kind: str) -> None:
    assert (LOSSES["distillation"](terms(kind)) >= -1e-6).all()


def test_distillation_is_0_exactly_where_exit_and_teacher_agree_up_to_a_constant() -> None:
    t = terms("plain")
    same = Terms(**{**t.__dict__, "logits": t.teacher_logits + 3.0})
    assert LOSSES["distillation"](same).abs().max() < 1e-6
    assert (LOSSES["distillation"](t) > 1e-2).all()


def test_without_a_game_the_adversarial_term_is_0() -> None:
    t = Terms(**{**terms("plain").__dict__, "judged": None})
    assert LOSSES["adversarial"](t).tolist() == [0.0] * N


def slow_logit(d: Discriminator, feature: Tensor, entry: Tensor) -> float:
    """The discriminator of one token, sum by sum."""

    def norm(layer: Any, x: list[float]) -> list[float]:
        mean = sum(x) / len(x)
        spread = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + layer.eps)
        weights, biases = layer.weight.tolist(), layer.bias.tolist()
        return [(v - mean) / spread * w + b for v, w, b in zip(x, weights, biases, strict=True)]

    seen = norm(d.feature_norm, feature.tolist())
    if d.entry_norm is not None:
        seen += norm(d.entry_norm, entry.tolist())
    for layer in d.net:
        if isinstance(layer, torch.nn.Linear):
            pairs = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
            seen = [sum(w * v for w, v in zip(row, seen, strict=True)) + b for row, b in pairs]
        else:
            seen = [v if v >= 0 else 0.2 * v for v in seen]
    return seen[0]


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("conditional", [True, False])
def test_the_discriminators_logits_match_a_slow_loop(conditional: bool, scale: float) -> None:
    judge = Discriminator(D, conditional=conditional, hidden=5)
    features, entries = torch.randn(N, D) * scale, torch.randn(N, D) * scale
    slow = [slow_logit(judge, f, e) for f, e in zip(features, entries, strict=True)]
    near(judge(features, entries).detach(), slow)


def test_only_a_conditional_discriminator_looks_at_the_entry_state() -> None:
    features, entries = torch.randn(N, D), torch.randn(N, D)
    for conditional in (True, False):
        judge = Discriminator(D, conditional=conditional)
        moved = not torch.equal(judge(features, entries), judge(features, torch.randn(N, D)))
        assert moved is conditional


def test_each_depth_has_a_discriminator_of_its_own() -> None:
    some = build_discriminators(D, (2, 4), conditional=True)
    assert list(some) == ["2", "4"]
    assert not {id(p) for p in some["2"].parameters()} & {id(p) for p in some["4"].parameters()}
