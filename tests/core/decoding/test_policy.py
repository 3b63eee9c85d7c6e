"""Laws of the policies: each equals a slow reference, costs no head it does not read, and keeps
what the decode loop guarantees."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import families
import pytest
import torch
from exit_walks import (
    DEPTHS,
    KINDS,
    NEW,
    check_finished_rows,
    check_walks,
    counted,
    decoded,
    record,
)
from families import WORDLESS
from reference import Script

from offramp.core import plugins
from offramp.core.decoding.confidence import FEATURE_SCORES, HEADS
from offramp.core.decoding.policy import (
    FULL,
    RETIRED,
    ExitPolicy,
    policy_from_json,
    policy_to_json,
    resolved,
)
from offramp.core.decoding.scores import SCORES
from offramp.core.engine.generate import generate
from offramp.core.engine.heads import ExitCheck, ExitScorer
from offramp.core.errors import InputError
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet
from offramp.engines import ENGINES, engine_named
from offramp.serving.core import EngineCore

MARGINS = {"llava": 0.03, "blip2-t5": 0.008}
"""At which the tokens of these tiny models leave here and there."""
IDLE = 0.94


@pytest.fixture
def decode(backbone, exits, batch):
    """`decode(name, rows, policy)`: backbone, exits, inputs and generation."""

    def run(name, rows, policy, **options):
        whole, parts, inputs = backbone(name), exits(name, depths=DEPTHS), batch(name, rows)
        return whole, parts, inputs, decoded(whole, parts, inputs, policy, **options)

    return run


# -- each equals its slow reference -----------------------------------------------------------


def slow_margin(seen):
    first, second = seen.logits[-1].softmax(-1).topk(2).values.tolist()
    return first - second


def slow_idle(seen):
    before, state = (row.double() for row in seen.states[-1])
    return (1 + (before @ state / (before.norm() * state.norm())).item()) / 2


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", KINDS)
def test_depths_and_scores_are_those_of_a_slow_walk_over_the_exits(
    name, rows, backbone, exits, batch, idle
):
    parts = backbone(name), exits(name, depths=DEPTHS), batch(name, rows)
    check_walks(slow_margin, "margin", MARGINS[name], *parts)
    check_walks(slow_idle, idle, IDLE, *parts)


# -- what a score does not read is not computed -----------------------------------------------


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("threshold", [IDLE, 1.0])
def test_a_score_of_features_runs_the_head_only_where_a_row_leaves(
    threshold, name, rows, batch, idle
):
    whole, inputs = Backbone(families.build(name)), batch(name, rows)
    policy = ExitPolicy(dict.fromkeys(DEPTHS, threshold), score=idle)
    given = {"exits": Exits(whole, DEPTHS), "policy": policy, "max_new_tokens": NEW}
    made, heads = counted(whole, lambda: generate(whole, inputs, **given))
    assert heads == sum(len(step.unique()) for step in made.depths.T)
    assert (len(made.depths.unique()) > 1) == (threshold < 1)


def test_a_score_of_logits_runs_the_head_at_each_exit(batch):
    whole, inputs = Backbone(families.build("blip2-t5")), batch("blip2-t5", 1)
    policy = ExitPolicy(dict.fromkeys(DEPTHS, 1.0), score="margin")
    given = {"exits": Exits(whole, DEPTHS), "policy": policy, "max_new_tokens": NEW}
    _, heads = counted(whole, lambda: generate(whole, inputs, **given))
    assert heads == NEW * (len(DEPTHS) + 1)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", KINDS)
def test_where_all_leave_in_any_case_no_score_is_computed(name, rows, decode, monkeypatch):
    monkeypatch.setitem(SCORES, "max_probability", lambda _: pytest.fail("a score was computed"))
    whole, parts, inputs, made = decode(name, rows, ExitPolicy({3: 0.0}))
    free = slice(0 if whole.is_encoder_decoder else 1, None)
    assert (made.depths[:, free] == 3).all() and made.scores.isnan().all()
    said = record(whole, inputs, made, parts).logits[3].argmax(-1)
    assert torch.equal(said[:, free], made.new_tokens[:, free])


@pytest.mark.parametrize("rows", [1, 4])
def test_a_token_that_leaves_unseen_has_no_score_of_an_earlier_exit(rows, decode):
    *_, made = decode("blip2-t5", rows, ExitPolicy({2: 0.03, 3: 0.0}))
    assert set(made.depths.flatten().tolist()) == {2, 3}
    assert torch.equal(made.scores.isnan(), made.depths == 3)


# -- what the decode loop guarantees --------------------------------------------------------------


def test_a_finished_row_keeps_no_score(backbone, exits, batch, idle):
    parts = backbone("llava"), exits("llava", depths=DEPTHS), batch("llava", 4)
    check_finished_rows("margin", MARGINS["llava"], *parts)
    check_finished_rows(idle, IDLE, *parts)


# -- what makes no sense is refused ---------------------------------------------------------------


@pytest.mark.parametrize(("typed", "meant"), [("entrop", "entropy"), ("margins", "margin")])
def test_an_unknown_score_is_refused_with_the_closest(typed, meant):
    with pytest.raises(InputError, match=f"Did you mean '{meant}'"):
        ExitPolicy(score=typed)


@pytest.fixture
def without_plugins(monkeypatch):
    """No package brings a score, as where offramp stands alone."""
    monkeypatch.setattr(plugins, "_points", lambda seam: {})
    for registry in (HEADS, FEATURE_SCORES, ENGINES):
        for name in ("agreement", "patience", "saturation", "propagate"):
            monkeypatch.delitem(registry, name, raising=False)


@pytest.mark.parametrize("name", ["agreement", "patience", "saturation"])
def test_without_the_lab_a_policy_by_one_of_its_scores_says_what_to_install(name, without_plugins):
    with pytest.raises(InputError, match=f"'{name}' is not known.*\n.*offramp-lab"):
        ExitPolicy({2: 0.5}, score=name)
    told = {**policy_to_json(ExitPolicy({2: 0.5})), "score": name}  # as older adapters hold it
    with pytest.raises(InputError, match="pip install"):
        policy_from_json(told)


def test_without_the_lab_propagated_keys_say_what_to_install(without_plugins):
    with pytest.raises(InputError, match=r"'propagate' is not known.*\n.*offramp-lab"):
        engine_named("propagate")


@pytest.mark.parametrize("field", ["thresholds", "drafts", "first"])
@pytest.mark.parametrize("wrong", [5, -0.1, 1.5])
def test_a_threshold_outside_0_to_1_is_refused(field, wrong):
    with pytest.raises(InputError, match=r"outside \[0, 1\].*\n.*from 0"):
        ExitPolicy(**{field: {2: wrong}})


def test_an_exit_without_a_threshold_is_off():
    assert ExitPolicy({2: None, 4: 0.5}) == ExitPolicy({4: 0.5})


def test_a_policy_has_at_most_eight_fields():
    assert len(fields(ExitPolicy)) <= 8


@pytest.mark.parametrize("score", ["max_probability", "margin", "entropy"])
def test_every_built_in_score_is_in_its_range(score, backbone, exits):
    policy = ExitPolicy({2: 0.5}, score=score)
    scorer = ExitScorer(backbone("llava"), policy, ExitSet(exits("llava")))
    state, entry, previous = torch.randn(3, 1, families.WIDTH)
    token = {"position": torch.tensor([0]), "previous_token": torch.tensor([1])}
    with torch.inference_mode():
        found = ExitCheck(scorer, 2, state, entry, previous, **token).score
    assert found.shape == (1,) and 0.0 <= float(found) <= 1.0


def test_an_engine_refuses_thresholds_where_no_exit_stands(backbone, exits):
    with pytest.raises(InputError, match="no exit stands"):
        EngineCore(backbone("llava"), exits("llava"), ExitPolicy({3: 0.5}))


# -- the first token --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "blip2-opt", "blip2-t5", "gemma3", "qwen3-vl"])
def test_a_first_token_may_exit_by_default_where_the_prompt_is_causal(
    backbone, exits, batch, name
) -> None:
    whole, parts = backbone(name), exits(name)
    rule = ExitPolicy({parts.depths[0]: 0.0})
    made = generate(
        whole,
        batch(name, 1),
        exits=parts,
        policy=rule,
        max_new_tokens=2,
        do_sample=False,
        suppress_tokens=WORDLESS,
    )
    early = whole.is_encoder_decoder or whole.family.causal_prompt
    assert made.depths.tolist() == [[parts.depths[0] if early else whole.depth, parts.depths[0]]]
    assert resolved(rule, whole).exit_in_prefill == whole.family.causal_prompt


@pytest.mark.parametrize("name", ["llava", "blip2-opt", "blip2-t5"])
def test_a_first_token_exits_by_its_own_threshold_and_the_others_by_theirs(
    backbone, exits, batch, scored, name
) -> None:
    whole, parts = backbone(name), exits(name)
    (depth, other), rows = parts.depths, batch(name, 1)

    def depths(first):
        scored(Script([0.5] * 4))
        policy = ExitPolicy({depth: 0.4}, first=first)
        options = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": WORDLESS}
        return generate(whole, rows, exits=parts, policy=policy, **options).depths[0].tolist()

    assert depths(None) == depths({depth: 0.5}) == [depth] * 3
    late = [whole.depth, depth, depth]
    assert depths({depth: 0.6}) == late
    assert depths({other: 0.1}) == late  # no threshold stands there
    if not whole.is_encoder_decoder:
        assert depths({}) == late


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5"])
def test_a_first_token_that_waits_keeps_its_own_thresholds_at_the_exits_above(
    backbone, exits, batch, scored, name
) -> None:
    whole, parts = backbone(name), exits(name)
    scored(lambda logits: torch.full(logits.shape[:-1], 0.5))
    (low, high), at = parts.depths, {parts.depths[0]: 0.9, parts.depths[1]: 0.4}
    options = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": WORDLESS}
    for first, depth in ((0.6, whole.depth), (0.4, high)):
        policy = ExitPolicy(at, first={low: 0.9, high: first})
        made = generate(whole, batch(name, 1), exits=parts, policy=policy, **options)
        assert made.depths[0].tolist() == [depth, high, high]


def test_thresholds_that_someone_asks_for_leave_first_tokens_the_stricter() -> None:
    policy = ExitPolicy({2: 0.3, 4: 0.3}, first={2: 0.5})
    assert policy.at({2: 0.1}).opening == {2: 0.5}
    assert policy.at({2: 0.9, 4: 0.2}).opening == {2: 0.9}
    assert policy.at({4: 0.2}).opening == {4: 0.5}
    assert ExitPolicy({2: 0.3}).at({2: 0.1}).opening == {2: 0.1}


def test_thresholds_of_first_tokens_are_stored_where_there_are_any() -> None:
    own = ExitPolicy({2: 0.5}, first={2: 0.9})
    assert policy_from_json(policy_to_json(own)) == own
    without = policy_to_json(ExitPolicy({2: 0.5}))
    assert "first" not in without and policy_from_json(without).first is None


def test_a_first_token_cannot_exit_where_no_exit_stands(backbone, exits, batch) -> None:
    policy = ExitPolicy({2: 0.5}, first={3: 0.5})
    some = exits("llava", depths=(2,))
    with pytest.raises(InputError):
        generate(backbone("llava"), batch("llava", 1), exits=some, policy=policy)
    with pytest.raises(InputError):
        EngineCore(backbone("llava"), some, policy)


def test_a_stored_policy_keeps_what_it_said_of_the_first_token() -> None:
    told = policy_to_json(ExitPolicy({2: 0.5}, first={}))
    assert not policy_from_json(told).exit_in_prefill
    del told["exit_in_prefill"]  # as adapters were written before there was a choice
    assert not policy_from_json(told).exit_in_prefill


@pytest.mark.parametrize("name", RETIRED)
def test_what_earlier_versions_stored_is_read_with_one_warning(name) -> None:
    plain = policy_to_json(ExitPolicy({2: 0.5}))
    with pytest.warns(UserWarning, match=name) as said:
        assert policy_from_json({**plain, name: {"2": 0.25}}) == ExitPolicy({2: 0.5})
    assert len(said) == 1


@pytest.mark.parametrize("more", [{"kv": "propagate"}, {"visual_keep": 0.5}], ids=str)
def test_what_earlier_versions_left_out_is_read_as_exact_with_a_warning(more: Any) -> None:
    plain = policy_to_json(ExitPolicy({2: 0.5}))
    assert plain["kv"] == "recompute"
    with pytest.warns(UserWarning, match=next(iter(more))) as said:
        assert policy_from_json({**plain, **more}) == ExitPolicy({2: 0.5})
    assert len(said) == 1


def test_a_registered_drafter_is_asked_for_without_exits(ngram: str) -> None:
    """By a request that says so, too."""
    policy = ExitPolicy(lossless=True, drafts={ngram: 0.0})
    assert policy.asked("lossless", None, ()) == policy
    assert policy.asked(None, None, ()) == FULL
    with pytest.raises(InputError, match="the engine runs none"):
        policy.asked("early_exit", None, ())
