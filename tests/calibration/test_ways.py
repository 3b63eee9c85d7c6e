"""Laws of what is chosen among lossless decoding, trust and thresholds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import fakes
import pytest
from guessing import OPTIONS, adapter, encoder, rounding

from offramp.adapter.answers import generate_answers
from offramp.calibration import threshold_evaluator, trust_path
from offramp.calibration.calibrate import calibrated
from offramp.calibration.trial import Calibration
from offramp.calibration.ways import by_trust, compared, fastest, way_of
from offramp.cli.commands.calibrate import _table
from offramp.core.decoding.policy import FULL, ExitPolicy
from offramp.core.errors import InputError
from offramp.promises.guarantee import standing

SOME = fakes.examples(40)
ASKED: dict[str, Any] = {"target": 0.9, "confidence": 0.8, **OPTIONS}


def found(kind: str, times: Mapping[str, float], **asked: Any) -> Calibration:
    """What is chosen where each way is so many times as fast as full depth."""

    def seconds(policies: Mapping[str, ExitPolicy]) -> dict[str, list[float]]:
        assert [*policies] == [way_of(policy)[0] for policy in policies.values()]
        return {"full": [1.0] * 8} | {name: [1 / times[name]] * 8 for name in policies}

    own = adapter(kind)
    policy = by_trust(own, **OPTIONS) or ExitPolicy()
    return fastest(own, encoder(), SOME, policy, seconds=seconds, **{**ASKED, **asked})


@pytest.mark.parametrize(
    "times",
    [
        {"lossless": 2.0, "trust": 3.0, "thresholds": 2.5},
        {"lossless": 3.0, "trust": 2.5, "thresholds": 2.0},
        {"lossless": 2.0, "trust": 2.5, "thresholds": 3.0},
    ],
)
def test_the_fastest_way_is_chosen_and_all_are_told(times: dict[str, float]) -> None:
    best = max(times, key=lambda name: times[name])
    told = found("drafting", times)
    assert way_of(told.policy)[0] == best
    assert {way.name: way.times for way in told.ways} == pytest.approx(times)
    assert {way.name for way in told.ways if way.risk is None} == {"lossless"}
    tested = {"trust"} if best != "thresholds" else {"trust", "thresholds"}
    assert {way.name for way in told.ways if way.promised} == tested
    assert [attempt.number for attempt in told.attempts] == [*range(1, 1 + len(tested))]
    kept = calibrated(adapter("drafting"), told, SOME)
    assert kept.policy.own_mode == ("lossless" if best == "lossless" else "early_exit")
    promised = standing(told.to_json(), told.conditions).promise
    assert bool(promised) is (best != "lossless") and bool(told.reason) is (best == "lossless")
    assert compared(told.ways).startswith(f"Fastest at what may be lost: {best}, 3.00x")
    shown = _table(told)
    assert all(f"{name:<12}" in shown for name in times) and "Nothing is guaranteed" not in shown
    assert ("Guaranteed with 80% confidence" in shown) is (best != "lossless")


def test_lossless_answers_behind_a_tower_that_rounds_are_not_called_the_full_models() -> None:
    own, reader = rounding("drafting")

    def seconds(policies: Mapping[str, ExitPolicy]) -> dict[str, list[float]]:
        assert "lossless" not in policies
        return {name: [1.0] for name in ("full", *policies)}

    told = fastest(own, reader, SOME, ExitPolicy(trust=2.0), seconds=seconds, **ASKED)
    assert told.ways and not told.policy.lossless


def test_what_was_estimated_is_at_most_the_target_on_the_same_answers() -> None:
    told = found("drafting", {"lossless": 2.0, "trust": 3.0, "thresholds": 2.5}, target=0.6)
    [estimated] = [way for way in told.ways if way.risk is not None and not way.promised]
    assert estimated.name == "thresholds" and estimated.answers == len(SOME)
    assert estimated.risk is not None and estimated.risk <= 0.6


def test_lossless_decoding_is_told_of_where_nothing_passes() -> None:
    told = found("drafting", {"lossless": 1.5, "thresholds": 9.0}, target=0.001)
    assert told.reason and not told.policy.lossless and told.policy.trust is None
    assert "lossless" in {way.name for way in told.ways}


def test_exits_that_do_not_draft_on_are_tested_by_thresholds() -> None:
    assert by_trust(adapter("layer"), **OPTIONS) is None
    assert by_trust(adapter("drafting"), **{**OPTIONS, "do_sample": True}) is None
    told = found("layer", {"lossless": 2.0, "thresholds": 3.0})
    assert way_of(told.policy)[0] == "thresholds" and len(told.attempts) == 1


def test_thresholds_that_an_engine_cannot_follow_take_nothing_from_the_others() -> None:
    """Files of llama.cpp may lack an exit that the adapter has."""
    own = adapter("drafting")

    class Lacking:
        name, rows = "lacking", 4

        def generate(self, inputs: Any, *, policy: Any = None, **options: Any) -> Any:
            if policy is not None and policy.thresholds:
                raise InputError("These files have no exit there.", "Export it.")
            return own.generate(inputs, policy=policy, **options)

    told = found("drafting", {"lossless": 2.0, "trust": 3.0}, runtime=Lacking())
    assert way_of(told.policy)[0] == "trust" and not told.reason
    assert {way.name for way in told.ways} == {"lossless", "trust"}


@pytest.mark.slow
def test_ways_are_answered_in_turn() -> None:
    own = adapter("drafting")
    policy = by_trust(own, **OPTIONS)
    assert policy is not None
    told = fastest(own, encoder(), SOME, policy, **ASKED)
    assert {"lossless", "trust"} <= {way.name for way in told.ways}
    assert all(way.times > 0 for way in told.ways)


@pytest.mark.slow
def test_the_full_models_answers_are_generated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many ways are tested: a large model's take hours."""
    asked: list[tuple[bool, int]] = []

    def noted(model: Any, encoder: Any, examples: Any, policy: Any, **options: Any) -> Any:
        asked.append((policy == FULL or policy.trust == trust_path.NOTHING, len(examples)))
        return generate_answers(model, encoder, examples, policy, **options)

    for module in (threshold_evaluator, trust_path):
        monkeypatch.setattr(module, "generate_answers", noted)
    told = found("drafting", {"lossless": 2.0, "trust": 2.5, "thresholds": 3.0})
    assert len(told.attempts) == 2
    assert [count for full, count in asked if full] == [len(SOME)]


def test_answers_and_the_path_have_a_bar_each() -> None:
    lengths: list[int] = []

    def noted(items: Any) -> Any:
        lengths.append(len(items))
        return items

    times = {"lossless": 2.0, "trust": 3.0, "thresholds": 2.5}
    told = found("drafting", times, progress=noted, batch_size=10)
    assert lengths == [len(SOME) // 10, len(told.path)]
