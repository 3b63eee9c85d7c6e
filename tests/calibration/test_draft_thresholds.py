"""Laws of choosing drafts: time alone decides, the output stays the full model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import families
import pytest
import torch

from offramp.adapter.adapter import Adapter
from offramp.calibration import draft_thresholds as module
from offramp.calibration.draft_thresholds import draft_speeds, with_drafts
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.errors import DataError
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits
from offramp.evaluation.timing import Timing

NAME = "blip2-opt"
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
PROMISE = {"risk": "disagreement", "target": 0.01}


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    backbone = Backbone(families.build(NAME))
    policy = ExitPolicy({4: 0.9})
    return Adapter(backbone, Exits(backbone, (2, 4)), policy, calibration=PROMISE)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds of each way instead of a clock; "full" takes 1."""
    seconds: dict[str, float] = {}

    def time_interleaved(
        ways: Mapping[str, Any], *_: Any, drafting: Any, **__: Any
    ) -> dict[str, Timing]:
        assert {"full", *drafting} == {*ways}
        return {name: Timing([1.0], [seconds.get(name, 2.0)]) for name in ways}

    monkeypatch.setattr(module, "time_interleaved", time_interleaved)
    seconds["full"] = 1.0
    return seconds


def test_every_exit_is_tried(adapter: Adapter, timed: Any) -> None:
    found = draft_speeds(adapter, [{}], thresholds=(0.1, 0.5))
    tried = [dict(d.thresholds) for d in found if d.longest == adapter.policy.max_draft]
    places = [[2], [4]]
    assert sorted(map(str, tried)) == sorted(
        str(dict.fromkeys(place, t)) for place in places for t in (0.1, 0.5)
    )


def test_the_fastest_is_stored_and_what_is_promised_stays(adapter: Adapter, timed: Any) -> None:
    timed["3"] = 0.5  # depth 4 at the second threshold
    found = draft_speeds(adapter, [{}], thresholds=(0.1, 0.5))
    assert found[0] == module.Drafting({4: 0.5}, 2.0)
    assert [d.speedup for d in found] == sorted((d.speedup for d in found), reverse=True)
    chosen = with_drafts(adapter, found)
    assert chosen.policy == replace(adapter.policy, drafts={4: 0.5})
    lengths = sorted(d.longest for d in found if d.thresholds == {4: 0.5})
    assert lengths == sorted({*module.LONGEST, adapter.policy.max_draft})
    assert with_drafts(adapter, [module.Drafting({4: 0.5}, 2.0, 3)]).policy.max_draft == 3
    assert chosen.calibration == PROMISE


def test_where_no_draft_is_faster_the_adapter_stays_as_it_is(adapter: Adapter, timed: Any) -> None:
    assert with_drafts(adapter, draft_speeds(adapter, [{}], thresholds=(0.1,))) is adapter


def test_without_prompts_there_is_nothing_to_race(adapter: Adapter) -> None:
    with pytest.raises(DataError, match="no prompts"):
        draft_speeds(adapter, [])


def test_a_race_over_real_prompts(adapter: Adapter, batch: Any) -> None:
    found = draft_speeds(adapter, [batch(NAME, 1)], thresholds=(0.0, 1.0), rounds=1, **GREEDY)
    lengths = {*module.LONGEST} - {ExitPolicy.max_draft}
    assert len(found) == 4 + len(lengths) and all(d.speedup > 0 for d in found)


def test_exits_that_draft_on_are_tried_by_how_far(adapter: Adapter, timed: Any) -> None:
    exits = Exits(adapter.backbone, (2, 4), kind="drafting")
    found = draft_speeds(Adapter(adapter.backbone, exits, ExitPolicy()), [{}])
    assert {d.longest for d in found} == {*module.LONGEST, ExitPolicy.max_draft}
    assert {tuple(d.thresholds) for d in found} == {(4,)}
    by_default = {d.thresholds[4] for d in found if d.longest == ExitPolicy.max_draft}
    assert by_default == {*module.PRODUCTS}


# -- what drafts mean ----------------------------------------------------------------------------


def test_lossless_drafts_by_the_drafts_where_there_are_any(adapter: Adapter, batch: Any) -> None:
    inputs = batch(NAME, 1)
    full = adapter.generate(inputs, policy=ExitPolicy(), **GREEDY)
    for policy in (
        ExitPolicy(lossless=True, drafts={2: 0.0}),
        ExitPolicy({4: 1.0}, lossless=True, drafts={2: 0.0}),
    ):
        ours = adapter.generate(inputs, policy=policy, **GREEDY)
        plain = adapter.generate(inputs, policy=ExitPolicy({2: 0.0}, lossless=True), **GREEDY)
        assert torch.equal(ours.sequences, full.sequences)
        assert ours.rounds == plain.rounds
        assert sum(drafted for drafted, _ in ours.rounds) > 0


def test_drafts_mean_nothing_to_early_exit(adapter: Adapter, batch: Any) -> None:
    inputs, policy = batch(NAME, 1), ExitPolicy({4: 0.0})
    plain = adapter.generate(inputs, policy=policy, **GREEDY)
    ours = adapter.generate(inputs, policy=replace(policy, drafts={2: 0.0}), **GREEDY)
    assert torch.equal(ours.sequences, plain.sequences) and torch.equal(ours.depths, plain.depths)


@pytest.mark.parametrize("policy", [ExitPolicy(), ExitPolicy(score="margin"), ExitPolicy({2: 0.5})])
def test_every_kind_of_policy_can_be_drafted_by(
    adapter: Adapter, policy: ExitPolicy, batch: Any
) -> None:
    ours = adapter.with_policy(policy)
    found = draft_speeds(ours, [batch(NAME, 1)], thresholds=(0.5,), rounds=1, **GREEDY)
    assert {tuple(d.thresholds) for d in found} == {(2,), (4,)}
