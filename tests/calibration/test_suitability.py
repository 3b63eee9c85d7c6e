"""Laws of the forecast: what settles is counted as said, and followed by a power law."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from offramp.adapter.answers import full_model_answers
from offramp.adapter.shipped import load_tiny
from offramp.calibration import suitability as module
from offramp.calibration.suitability import (
    FEWEST,
    LEVELS,
    LOSSLESS,
    RISKS,
    TAKEN,
    Prospect,
    Shown,
    Suitability,
    exiting,
    followed,
    looked_at,
    settled,
    suitability,
    taken,
)
from offramp.core.errors import DataError, InputError
from offramp.data.scenes.tasks import captions
from offramp.evaluation.scripted_exits import generate_drafted, generate_forced
from offramp.features.input_processor import InputProcessor
from offramp.inputs.example import Example


@pytest.fixture(scope="module")
def encoder() -> InputProcessor:
    return InputProcessor(*load_tiny("opt"))


@pytest.fixture(scope="module")
def scenes() -> list[Example]:
    return captions("test", FEWEST).examples


@pytest.fixture
def counted_layers(encoder: InputProcessor, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The clock counts layers, since seconds of a busy machine say little."""
    run = [0.0]

    def count(*_: object) -> None:
        run[0] += 1

    def clock() -> float:
        run[0] += 1e-6  # no answer takes no time
        return run[0]

    hooks = [layer.register_forward_pre_hook(count) for layer in encoder.backbone.layers]
    monkeypatch.setattr(module, "clock_on", lambda _: clock)
    yield
    for hook in hooks:
        hook.remove()


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


@pytest.mark.parametrize("risk", [0.0, 0.01, 0.1, 1.0])
def test_what_exits_at_a_risk_of_answers_is_what_a_search_over_all_thresholds_finds(
    risk: float,
) -> None:
    draw = np.random.default_rng(5)
    answer = np.repeat(np.arange(50), 6)
    scores = draw.integers(0, 40, 300) / 40
    right = draw.random(300) < 0.5 + 0.5 * scores
    shares = [0.0]
    for threshold in np.unique(scores):
        leaves = scores >= threshold
        if len(np.unique(answer[leaves & ~right])) <= risk * 50 + 1e-9:
            shares.append(leaves.mean())
    assert exiting(scores, right, answer, risk) == pytest.approx(max(shares))


@pytest.mark.parametrize("risk", [0.0, 0.02, 0.1, 1.0])
def test_what_is_taken_at_a_risk_is_what_a_search_over_all_levels_of_trust_finds(
    risk: float,
) -> None:
    draw = np.random.default_rng(7)
    answer = np.repeat(np.arange(50), draw.integers(1, 8, 50))
    scores = draw.integers(20, 41, len(answer)) / 40
    right = draw.random(len(answer)) < scores
    products = np.array([np.prod(scores[answer == n]) for n in range(50)])
    wrong = np.array([not right[answer == n].all() for n in range(50)])
    shares = [0.0]
    for level in np.unique(products):
        some = products >= level
        if (some & wrong).sum() <= risk * 50 + 1e-9:
            shares.append(np.isin(answer, np.flatnonzero(some)).mean())
    assert taken(scores, right, answer, risk) == pytest.approx(max(shares))


def test_nothing_settles_where_the_surest_is_wrong() -> None:
    assert settled(np.array([0.9, 0.5]), np.array([False, True]), 0.99) == 0.0


@pytest.mark.parametrize("speed", [0.8, 1.6])
def test_an_interval_of_speeds_is_told_from_its_lower_end(speed: float) -> None:
    """More exits make a model faster, or slower where they cost more than they spare."""
    speeds = {(4, 0.5): speed, (4, LOSSLESS): 0.5, (4, TAKEN): 0.5}
    shares = {0.01: (0.3, 0.2, 0.6)}
    foretold = module._Foretold(0.7, {0.95: 0.5}, shares, 0.7, shares)
    told = module._prospect(4, foretold, speeds)
    likely, low, high = told.calibrated[0.01]
    assert low < likely < high and (likely > 1) == (speed > 1)


def test_what_is_taken_unverified_spares_the_drafts_their_verification() -> None:
    """Nothing taken is lossless, everything what drafts alone cost; the faster way is told."""
    speeds = {(4, 1.0): 3.0, (4, LOSSLESS): 2.0, (4, TAKEN): 4.0}
    few = {0.01: (0.01, 0.0, 0.02)}
    for share, speed in ((0.0, 2.0), (0.5, 1 / (0.5 / 2 + 0.5 / 4)), (1.0, 4.0)):
        foretold = module._Foretold(0.7, {}, few, 0.7, {0.01: (share, share, share)})
        told = module._prospect(4, foretold, speeds)
        assert told.calibrated[0.01] == pytest.approx((speed, speed, speed))


def test_a_power_law_is_followed_to_where_it_leads_and_never_upwards() -> None:
    learnt = np.array([10.0, 20.0, 40.0])
    falling, rising = 0.8 * learnt**-0.3, 0.1 * learnt**0.5
    found = followed(learnt, np.stack([falling, rising], 1), 640.0)
    assert found[0] == pytest.approx(0.8 * 640**-0.3)
    assert found[1] <= rising.max()


@pytest.mark.slow
@pytest.mark.usefixtures("counted_layers")
def test_the_shipped_model_settles_early_and_fast(
    encoder: InputProcessor, scenes: list[Example]
) -> None:
    found = suitability(encoder, scenes, depths=(2, 8), planned=1000)
    first, last = found.prospects
    assert found.tokens > 10 * FEWEST and not found.shortlist
    assert first.depth == 2 and first.settled[0.95] > 0.9
    assert all(p.settled[0.9] >= p.settled[0.95] >= p.settled[0.98] for p in found.prospects)
    for prospect in found.prospects:
        for speed, low, high in prospect.calibrated.values():
            assert 0.9 < low <= speed <= high + 1e-9
    assert found.best(0.95) is first and first.speedup[0.95] > last.speedup[0.95] > 1.0
    assert first.lossless > last.lossless and first.lossless > 1.0


@pytest.mark.slow
def test_the_forecast_is_the_same_every_time_but_for_the_clock(
    encoder: InputProcessor, scenes: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SECONDS", 1.0)
    one, two = (suitability(encoder, scenes, depths=(3,)).prospects for _ in range(2))
    clock: dict[str, Any] = {"speedup": {}, "thresholds": {}, "trust": {}, "lossless": 1.0}
    assert [replace(p, **clock) for p in one] == [replace(p, **clock) for p in two]


@pytest.mark.slow
def test_drafts_that_follow_drafts_are_foretold_without_the_layers_below(
    encoder: InputProcessor, scenes: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exit that reads these layers knows nearly every token of the scenes, and such drafts do
    not."""
    told: list[Any] = []
    speeds = module._speeds

    def noted(*args: Any) -> Any:
        told.append(args[2][2])
        return speeds(*args)

    monkeypatch.setattr(module, "_speeds", noted)
    monkeypatch.setattr(module, "SECONDS", 0.0)
    [found] = suitability(encoder, scenes, depths=(2,)).prospects
    [foretold] = told
    assert found.agreement == foretold.agreement > 0.95 > foretold.accepted > 0.3
    assert all(foretold.trusted[risk] < foretold.exits[risk] for risk in RISKS)


@pytest.mark.slow
@pytest.mark.usefixtures("counted_layers")
def test_speed_is_tried_with_exits_that_leave_as_often_as_foretold(
    encoder: InputProcessor, scenes: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where more leave, or sooner, fewer layers run; fewest where answers are taken, whose prompts
    are never read to the end. Where an exit drafts, answers stay the full model's."""
    left: dict[int, list[int]] = {}
    drafted: list[tuple[int, ...]] = []

    def forced(*args: Any, depth: int, **options: Any) -> Any:
        output = generate_forced(*args, depth=depth, **options)
        left.setdefault(depth, []).append(int((output.depths == depth).sum()))
        return output

    def draft(*args: Any, **options: Any) -> Any:
        output = generate_drafted(*args, **options)
        drafted.append(tuple(output.new_tokens.flatten().tolist()))
        return output

    monkeypatch.setattr(module, "generate_forced", forced)
    monkeypatch.setattr(module, "generate_drafted", draft)
    monkeypatch.setattr(module, "SECONDS", 1e9)  # of layers, which are the seconds here
    monkeypatch.setattr(module, "ROUNDS", 1)
    settle = {3: {0.9: 0.75, 0.95: 0.6, 0.98: 0.5}, 9: {0.9: 0.75, 0.95: 0.75}}
    shares = {depth: module._Foretold(0.9, own, {}, 0.9, {}) for depth, own in settle.items()}
    answers = full_model_answers(encoder, scenes, batch_size=8, max_new_tokens=16)
    told, _ = module._speeds(encoder, answers, shares, None, 16, 0, iter)
    speeds = {
        (depth, share if isinstance(share, str) else round(share, 1)): speed
        for (depth, share), speed in told.items()
    }
    kinds = (1.0, LOSSLESS, TAKEN)
    assert {*speeds} == {(d, s) for d, low in ((3, 0.5), (9, 0.8)) for s in (low, *kinds)}
    assert speeds[3, TAKEN] > speeds[3, 1.0] and speeds[3, TAKEN] > speeds[3, LOSSLESS] > 1.0
    assert speeds[3, 1.0] > speeds[3, 0.5] > 1.0 and speeds[9, 1.0] < speeds[3, 1.0]
    tokens = sum(len(answer.ids) for answer in answers[: module.TIMED])
    once = left[9][1 : 1 + 2 * module.TIMED]  # behind a try at the first one
    assert abs(sum(once) - (0.75 + 1) * tokens) <= 1
    assert {*drafted} == {answer.ids for answer in answers[: module.TIMED]}
    assert all(isinstance(share, str) or abs(share * tokens % 1) in (0, 1) for _, share in told)
    monkeypatch.setattr(module, "SECONDS", 0.0)  # a slow model writes few answers
    left.clear()
    module._speeds(encoder, answers, shares, None, 16, 0, iter)
    assert len(left[9]) == 1 + 2 * module.FEWEST_TIMED


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


@pytest.mark.parametrize(
    ("low", "lossless", "settles", "begins", "faster"),
    [
        (
            1.2,
            1.0,
            0.6,
            "Exits would pay: decoding 1.30x as fast [1.20, 1.50] while at most 1%",
            1.3,
        ),
        (
            1.2,
            1.22,
            0.6,
            "Exits would pay: decoding 1.30x as fast [1.20, 1.50] while at most 1%",
            1.3,
        ),
        (1.2, 1.25, 0.6, "Exits would pay: decoding 1.25x as fast losslessly", 1.25),
        (1.2, 1.4, 0.6, "Exits would pay: decoding 1.40x as fast losslessly", 1.4),
        (1.0, 1.1, 0.0, "Exits would pay: decoding 1.10x as fast losslessly", 1.1),
        (1.0, 1.0, 0.6, "Exits would pay only if words may change: ", 1.6),
        (1.0, 1.0, 0.0, "Exits would not pay here: ", 1.0),
    ],
)
def test_the_verdict_is_of_the_lower_end(
    low: float, lossless: float, settles: float, begins: str, faster: float
) -> None:
    speed = 1 + settles
    one = Prospect(
        4,
        0.7,
        dict.fromkeys(LEVELS, settles),
        dict.fromkeys(LEVELS, speed),
        dict.fromkeys(RISKS, (1.3, low, 1.5)),
        dict.fromkeys(RISKS, (1.1, 1.0, 1.2)),
        lossless,
    )
    found = Suitability(12, 20, 100, 2000, False, (1.0, 0.8), (one,))
    assert found.verdict(0.95).startswith(begins) and "depth 4 of 12" in found.verdict(0.95)
    assert ("1.22x with none changed" in found.verdict(0.95)) == (lossless == 1.22)
    assert found.seconds_with(0.95) == pytest.approx(0.2 + 0.8 / faster)
    ranks = (0.0, 0.3, 0.59, 0.61, 0.99)
    told = replace(found, shown=(Shown("a", (9, 8, 7, 6, 5, 4), {4: ranks}),)).answers(0.95)
    assert told[0]["depths"] == [12, *(4 if rank < settles else 12 for rank in ranks)]
