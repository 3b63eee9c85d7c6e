"""Laws of the promise: it holds on fresh data, and is not given where the data cannot bear it."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from offramp import calibrate as module
from offramp.calibrate import calibrate, hoeffding_bentkus
from offramp.errors import InputError
from offramp.policy import Policy

GRID = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5)


@dataclass
class FakeAdapter:
    """An adapter whose answers differ from the full model's wherever score < difficulty says so."""

    depths = (3,)

    @property
    def exits(self) -> "FakeAdapter":
        return self


def promise(
    monkeypatch: pytest.MonkeyPatch, losses: dict[float, np.ndarray], **options: Any
) -> Any:
    """Calibrate on given losses [n] by threshold."""
    n = len(next(iter(losses.values())))

    def answers(adapter: Any, encoder: Any, examples: Any, policy: Policy, *_: Any) -> list[Any]:
        if not policy.thresholds:
            return [(0,)] * n
        (threshold,) = set(policy.thresholds.values())
        return [(int(loss),) for loss in losses[threshold]]

    monkeypatch.setattr(module, "_answers", answers)
    return calibrate(FakeAdapter(), None, range(n), Policy(), thresholds=tuple(losses), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", ["monotone", "dip"])
def test_risk_on_fresh_data_exceeds_the_target_no_more_often_than_stated(
    monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    true = {"monotone": [0, 0.01, 0.03, 0.05, 0.08, 0.2], "dip": [0.04, 0.08, 0.03, 0.2, 0.01, 0]}
    risk = dict(zip(GRID, true[shape], strict=True))
    draw = np.random.default_rng(0)
    violations = 0
    trials = 400
    for _ in range(trials):
        losses = {t: draw.random(300) < risk[t] for t in GRID}
        found = promise(monkeypatch, losses, target=0.05, confidence=0.9)
        chosen = found.policy.thresholds.get(3)
        violations += chosen is not None and risk[chosen] > 0.05
    # 10% are allowed; three standard errors above would be 14.5%.
    assert violations / trials <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / trials)


def test_the_last_threshold_that_passed_is_returned_not_the_first_that_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = {0.9: np.zeros(1000), 0.8: np.zeros(1000), 0.7: np.ones(1000), 0.6: np.zeros(1000)}
    found = promise(monkeypatch, losses, target=0.05)
    assert found.policy.thresholds == {3: 0.8}


def test_too_few_samples_promise_nothing_and_say_how_many_are_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = promise(monkeypatch, {0.9: np.zeros(100)}, target=0.01)
    assert found.policy.thresholds == {}
    assert 0.99**found.needed <= 0.05 < 0.99 ** (found.needed - 1)


def test_the_stated_need_is_enough_when_nothing_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = promise(monkeypatch, {0.9: np.zeros(10)}, target=0.01).needed
    assert promise(monkeypatch, {0.9: np.zeros(needed)}, target=0.01).policy.thresholds == {3: 0.9}


def test_p_values_are_valid() -> None:
    draw = np.random.default_rng(1)
    risks = draw.binomial(200, 0.1, size=20_000) / 200
    p = np.array([hoeffding_bentkus(r, 200, 0.1) for r in np.unique(risks)])
    by_risk = dict(zip(np.unique(risks), p, strict=True))
    values = np.array([by_risk[r] for r in risks])
    for level in (0.01, 0.05, 0.1, 0.3):
        assert (values <= level).mean() <= level + 3 * math.sqrt(level / 20_000)


@pytest.mark.parametrize(("target", "confidence"), [(0, 0.9), (1, 0.9), (0.1, 0), (0.1, 1)])
def test_a_target_off_the_unit_interval_is_refused(target: float, confidence: float) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        calibrate(None, None, [], Policy(), target=target, confidence=confidence)  # type: ignore[arg-type]


def test_answers_leave_padding_out() -> None:
    from offramp.policy import Generation

    result = Generation(
        torch.tensor([[9, 4, 5, 1], [9, 6, 7, 8]]),
        torch.tensor([[3, 12, 0], [12, 3, 3]]),
        torch.zeros(2, 3),
        12,
    )
    assert module.answer_ids(result) == [(4, 5), (6, 7, 8)]
