"""Laws of calibrated trust: one run tells what answers lose at every level."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
import torch
from guessing import OPTIONS, adapter, encoder, rounding

from offramp.adapter.adapter import Adapter
from offramp.adapter.answers import generate_answers
from offramp.calibration.calibrate import calibrate, calibrated
from offramp.calibration.risk_functions import RISKS
from offramp.calibration.trust_path import LEVELS, TrustPath, trusting
from offramp.core.decoding.policy import FULL, ExitPolicy
from offramp.core.errors import InputError
from offramp.promises.likeness import mean_log_score

GRID = (0.05, 0.02, 0.01, 0.005, 0.002, 0.0)
KINDS = ("layer", "drafting")


def path(kind: str) -> TrustPath:
    policy = trusting(ExitPolicy(), adapter(kind), OPTIONS["max_new_tokens"])
    some = fakes.examples(40)
    return TrustPath.of(
        adapter(kind), encoder(), some, policy, RISKS["disagreement"], batch_size=8, **OPTIONS
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_losses_at_a_level_are_those_of_answers_written_at_it(kind: str) -> None:
    tried, before = path(kind), np.zeros(40)
    full = generate_answers(adapter(kind), encoder(), tried.examples, FULL, **OPTIONS)
    assert [answer.ids for answer in tried.full] == [answer.ids for answer in full]
    changed = []
    for level in GRID:
        policy = tried.at({4: level})
        assert policy.trust == level
        early = generate_answers(
            adapter(kind), encoder(), tried.examples, policy, batch_size=10, **OPTIONS
        )
        losses = tried.losses({4: level})
        assert losses.tolist() == tried.risk.losses(early, full, tried.examples).tolist()
        assert (losses >= before).all()  # nested
        before = losses
        changed.append(losses.mean())
    assert changed[-1] > changed[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_lowest_level_that_keeps_the_risk_is_chosen_and_stays(
    kind: str, tmp_path: Path
) -> None:
    some = fakes.examples(40)
    asked: dict[str, Any] = {"confidence": 0.8, "thresholds": GRID, **OPTIONS}
    policy = ExitPolicy(trust=1.0)
    for target in (0.06, 0.9):
        found = calibrate(adapter(kind), encoder(), some, policy, target=target, **asked)
        passed = [point for point in found.path if point.bound <= target]
        expected = min(passed[-1].thresholds.values()) if passed else None
        assert found.policy.trust == expected and bool(found.reason) is (expected is None)
        assert len(found.path) in (len(passed) + 1, len(GRID))
    assert not found.reason
    kept = calibrated(adapter(kind), found, some)
    kept.save(tmp_path)
    again = Adapter.from_pretrained(encoder().backbone, tmp_path)
    assert again.policy == found.policy and again.policy.own_mode == "early_exit"
    assert again.attempts[-1]["outcome"]["trust"] == found.policy.trust
    inputs = encoder().prompts(some[:2])
    made = again.generate(inputs, **OPTIONS)
    alike = adapter(kind).generate(inputs, policy=found.policy, **OPTIONS)
    assert torch.equal(made.sequences, alike.sequences)


def test_what_a_rounding_tower_changes_is_among_what_is_promised() -> None:
    some, (own, reader) = fakes.examples(40), rounding("layer")
    asked: dict[str, Any] = {"target": 0.9, "confidence": 0.8, "thresholds": (1.0, 0.0), **OPTIONS}
    full, other = (
        generate_answers(each, encoder(), some, FULL, **OPTIONS)
        for each in (encoder().backbone, reader.backbone)
    )
    changed = np.mean([a.ids != b.ids for a, b in zip(full, other, strict=True)])
    assert changed > 0
    found = calibrate(own, reader, some, ExitPolicy(trust=1.0), **asked)
    assert found.path[0].risk == changed and found.path[1].risk > changed


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_known_by_the_product_that_it_was_taken_for(kind: str) -> None:
    """By which later ones are called like those calibrated, or not; the full model's have none."""
    tried = path(kind)
    offers = [[product for product, _ in full.offers] for full in tried.full]
    policy = tried.at({4: sorted(max(own, default=0.0) for own in offers)[30]})
    early = generate_answers(
        adapter(kind), encoder(), tried.examples, policy, batch_size=1, **OPTIONS
    )
    taken = {min(answer.depths) < encoder().backbone.depth for answer in early}
    assert taken == {True, False}
    for answer, full in zip(early, tried.full, strict=True):
        known = mean_log_score(answer.scores)
        if min(answer.depths) == encoder().backbone.depth:
            assert known is None and answer.ids == full.ids
        else:
            [product] = {score for score in answer.scores if score == score}
            assert known == pytest.approx(math.log(product))


def test_what_is_never_taken_is_refused() -> None:
    some, policy = fakes.examples(4), ExitPolicy(trust=1.0)
    with pytest.raises(InputError, match=r"Only greedy drafts .*\nCalibrate greedy"):
        calibrate(adapter("drafting"), encoder(), some, policy, do_sample=True)
    with pytest.raises(InputError, match=r"first token is decided about with all others"):
        calibrate(adapter("drafting"), encoder(), some, policy, first=0.9, **OPTIONS)


def test_levels_fall_to_nought() -> None:
    assert [*LEVELS] == sorted(set(LEVELS), reverse=True) and LEVELS[-1] == 0 < LEVELS[0] < 1


def test_a_round_holds_an_answer_or_as_much_as_a_call_verifies() -> None:
    own = replace(ExitPolicy({4: 0.5}), max_draft=5)
    assert trusting(own, adapter("drafting"), 3).max_draft == 5
    made = trusting(own, adapter("drafting"), 200)
    assert made.max_draft == 32 and made.drafts == {4: 0.0} and not made.thresholds
