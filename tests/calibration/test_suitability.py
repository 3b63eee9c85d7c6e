"""Laws of the forecast: what settles is counted as said, and followed by a power law."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from offramp.calibration import suitability as module
from offramp.calibration.cost_model import Costs
from offramp.calibration.suitability import FEWEST, followed, looked_at, settled, suitability
from offramp.data.example import Example
from offramp.data.scenes.tasks import captions
from offramp.errors import DataError, InputError
from offramp.models.input_processor import InputProcessor
from offramp.models.shipped import load_tiny

COSTS = Costs(
    layers=12, batch=1, context=20, layer=(1e-3,) * 4, head=(1e-4,) * 4, exit=1e-3, check=1e-4,
    score=0.0, store=0.0, token=1e-4, reenter=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def encoder() -> InputProcessor:
    return InputProcessor(*load_tiny("opt"))


@pytest.fixture(scope="module")
def scenes() -> list[Example]:
    return captions("test", FEWEST).examples


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What costs were asked for; they are `COSTS`."""
    asked: dict[str, Any] = {}

    def measure(*_: Any, **options: Any) -> Costs:
        asked.update(options)
        return COSTS

    monkeypatch.setattr(module, "measure_costs", measure)
    return asked


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 1.0])
def test_what_settles_is_what_a_search_over_all_thresholds_finds(level: float) -> None:
    draw = np.random.default_rng(3)
    scores = draw.integers(0, 12, 200) / 12  # many are the same
    right = draw.random(200) < 0.4 + 0.6 * scores
    shares = [0.0]
    for threshold in np.unique(scores):
        leaves = scores >= threshold
        if (leaves & ~right).sum() <= (1 - level) * 200 + 1e-9:
            shares.append(leaves.mean())
    assert settled(scores, right, level) == max(shares)


def test_nothing_settles_where_the_surest_is_wrong() -> None:
    assert settled(np.array([0.9, 0.5]), np.array([False, True]), 0.99) == 0.0


def test_a_power_law_is_followed_to_where_it_leads_and_never_upwards() -> None:
    learnt = np.array([10.0, 20.0, 40.0])
    falling, rising = 0.8 * learnt**-0.3, 0.1 * learnt**0.5
    found = followed(learnt, np.stack([falling, rising], 1), 640.0)
    assert found[0] == pytest.approx(0.8 * 640**-0.3)
    assert found[1] <= rising.max()


def test_the_shipped_model_settles_early_and_fast(
    encoder: InputProcessor, scenes: list[Example], costs: dict[str, Any]
) -> None:
    found = suitability(encoder, scenes, depths=(2, 8), planned=1000)
    first, last = found.prospects
    assert found.tokens > 10 * FEWEST and not found.shortlist and not costs["shortlist"]
    assert first.depth == 2 and first.settled[0.95] > 0.9
    assert all(p.settled[0.9] >= p.settled[0.95] >= p.settled[0.98] for p in found.prospects)
    assert found.best(0.95) is first and first.speedup[0.95] > last.speedup[0.95] > 1.0


def test_the_forecast_is_the_same_every_time(
    encoder: InputProcessor, scenes: list[Example], costs: dict[str, Any]
) -> None:
    one, two = (suitability(encoder, scenes, depths=(3,)) for _ in range(2))
    assert one == two


def test_too_few_prompts_are_refused(encoder: InputProcessor, scenes: list[Example]) -> None:
    with pytest.raises(DataError, match="15 prompts are too few"):
        suitability(encoder, scenes[:-1])
    with pytest.raises(InputError, match="Training on 3 prompts"):
        suitability(encoder, scenes, planned=3)


@pytest.mark.parametrize("layers", [2, 3, 12, 30, 80])
def test_depths_that_are_tried_fit_the_model(layers: int) -> None:
    depths = looked_at(layers)
    assert depths == tuple(sorted(set(depths))) and len(depths) <= 6
    assert depths[0] >= 1 and depths[-1] <= max(1, 0.75 * layers + 0.5)
