"""What a request may ask for, and which guarantees stand inside vLLM; both without vLLM."""

from __future__ import annotations

import math
from typing import Any

import pytest

from offramp_vllm import tell
from offramp_vllm.policy import Rule, asked
from offramp_vllm.refuse import Refused

RULE = Rule((0.5,), (math.nan,))
POLICY = {
    "thresholds": {"2": 0.5},
    "score": "max_probability",
    "kv": "recompute",
    "exit_in_prefill": True,
    "shortlist": False,
}
HERE = {"engine": "vllm", "dtype": "float32", "quantized": "", "device": "cpu"}
KEPT = {
    "risk": "disagreement",
    "target": 0.01,
    "confidence": 0.95,
    "measured": 0.004,
    "conditions": {**POLICY, **HERE},
}


@pytest.mark.parametrize(
    "extra",
    [
        {"offramp_treshold": 0.9},
        {"offramp_mode": "full", "offramp_threshold": 0.9},
        {"offramp_mode": "lossless", "offramp_threshold": 0.9},
        {"offramp_threshold": True},
        {"offramp_threshold": 1},  # as vLLM hands true on
        {"offramp_threshold": "0.9"},
        {"offramp_threshold": 1.5},
        {"offramp_threshold": math.nan},
        {"offramp_mode": "fast"},
        {"offramp_trust": True},
        {"offramp_trust": 1},
        {"offramp_trust": -0.5},
        {"offramp_trust": math.inf},
        {"offramp_trust": math.nan},
        {"offramp_trust": 0.5, "offramp_threshold": 0.9},
        {"offramp_trust": 0.5, "offramp_mode": "full"},
        {"offramp_trust": 0.5, "offramp_mode": "lossless"},
    ],
    ids=str,
)
def test_settings_that_say_nothing_are_refused(extra: dict[str, Any]) -> None:
    with pytest.raises(Refused) as refused:
        asked(RULE, extra, drafts=True, by_exits=True)
    assert len(str(refused.value).splitlines()) == 2


def test_trust_decides_in_place_of_thresholds() -> None:
    trusting = Rule.of({**POLICY, "thresholds": {}, "trust": 0.8, "max_draft": 30}, (2,))
    early = asked(trusting, {"offramp_mode": "early_exit"}, drafts=True, by_exits=True)
    assert early.rule.takes and early.rule.trust == 0.8 and early.rule.longest == 30
    assert not early.rule.is_on and early.rule.waits  # a prompt waits for its first drafts
    own = asked(trusting, None, drafts=True, by_exits=True, own="early_exit")
    assert own == early
    assert asked(trusting, None, drafts=True, by_exits=True).mode == "lossless"
    asked_for = asked(trusting, {"offramp_trust": 0.5}, drafts=True, by_exits=True)
    assert asked_for.rule == trusting.taking(0.5)
    assert asked(trusting, {"offramp_threshold": 0.9}, drafts=True).rule.trust is None
    lossless = asked(trusting, {"offramp_mode": "lossless"}, drafts=True, by_exits=True).rule
    assert lossless.trust is not None and not lossless.takes


@pytest.mark.parametrize("drafts", [False, True])  # True: of another model's
def test_trust_needs_the_exits_own_drafts(drafts: bool) -> None:
    with pytest.raises(Refused, match="none of these"):
        asked(RULE, {"offramp_trust": 0.5}, drafts=drafts)


def test_a_guarantee_of_trust_stands_for_that_trust_and_length_of_drafts() -> None:
    by_trust = {**POLICY, "thresholds": {}, "trust": 0.8, "max_draft": 30}
    then = {"conditions": {**by_trust, **HERE}}
    assert standing(by_trust, **then) == ""
    assert "trust" in standing({**by_trust, "trust": 0.7}, **then)
    assert "max_draft" in standing({**by_trust, "max_draft": 8}, **then)
    assert "trust" in standing({**POLICY, "thresholds": {}}, **then)
    assert standing(POLICY, conditions={**POLICY, **HERE, "trust": -1.0}) == ""


def test_settings_of_others_are_left_alone() -> None:
    assert asked(RULE, {"another": 1, "offramp_threshold": 0.9}, drafts=False).rule == RULE.at(0.9)


def standing(policy: dict[str, Any] = POLICY, **changed: Any) -> str:
    [found] = tell.guarantees([{**KEPT, **changed}], policy, HERE)
    return found.reason


def test_a_guarantee_stands_where_it_was_calibrated() -> None:
    assert not standing()
    assert "disagreement at most 0.01" in tell.in_words([*tell.guarantees([KEPT], POLICY, HERE)])


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("measured", {"measured": None}),
        ("engine torch", {"conditions": {**POLICY, **HERE, "engine": "torch"}}),
        ("dtype bfloat16", {"conditions": {**POLICY, **HERE, "dtype": "bfloat16"}}),
        ("quantized", {"conditions": {**POLICY, **HERE, "quantized": "int8"}}),
        ("thresholds", {"policy": {**POLICY, "thresholds": {"2": 0.4}}}),
        ("first", {"policy": {**POLICY, "first": {"2": 0.4}}}),
        ("shortlist", {"policy": {**POLICY, "shortlist": True}}),
        ("thresholds None", {"conditions": None}),
    ],
)
def test_it_stands_nowhere_else(reason: str, change: dict[str, Any]) -> None:
    assert reason in standing(**change)


def test_each_kind_of_prompt_has_its_own_target() -> None:
    kinds = [{"kind": "Caption:", "target": None}, {"kind": "Question: ...", "target": 0.15}]
    found = [*tell.guarantees([{**KEPT, "kinds": kinds}], POLICY, HERE)]
    assert [(one.kind, one.target) for one in found] == [
        ("Caption:", "0.01"),
        ("Question: ...", "0.15"),
    ]
