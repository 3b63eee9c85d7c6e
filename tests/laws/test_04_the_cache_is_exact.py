"""Law 4: with the exact cache policy, what is read at (token, depth) does not depend on where
earlier tokens exited."""

from __future__ import annotations

import families
import pytest
import torch
from decoding import CALM, EXACT, NEW, errors_by_depth
from families import NAMES
from reference import Dice

from offramp.core.decoding.policy import ExitPolicy
from offramp.core.engine.generate import generate
from offramp.core.models.exits import Exits


@pytest.mark.parametrize("name", NAMES)
def test_recompute_keeps_every_step_exact(name, backbone, exits, batch, scored):
    whole, parts = backbone(name, wide=CALM), exits(name, wide=CALM)
    first, second = parts.depths
    for rows, prefill in ((1, False), (1, True), (4, False), (4, True)):
        scored(Dice(5))
        policy = ExitPolicy({first: 0.4, second: 0.5}, first=None if prefill else {})
        made, errors = errors_by_depth(whole, parts, batch(name, rows), policy)
        assert set(errors) == {first, second, whole.depth}
        assert rows == 1 or any(len(set(step)) > 1 for step in made.depths.T.tolist())
        assert max(errors.values()) <= EXACT, (rows, prefill, errors)


@pytest.mark.parametrize("name", NAMES)
def test_a_first_token_with_a_threshold_of_its_own_keeps_every_step_exact(
    name, backbone, exits, batch, scored
):
    whole, parts = backbone(name, wide=CALM), exits(name, wide=CALM)
    first, second = parts.depths
    for own in ({first: 0.0}, {second: 0.1}, {first: 0.9, second: 0.2}):
        scored(Dice(5))
        policy = ExitPolicy({first: 0.7, second: 0.6}, first=own)
        _, errors = errors_by_depth(whole, parts, batch(name, 4), policy)
        assert set(errors) == {first, second, whole.depth}
        assert max(errors.values()) <= EXACT, (own, errors)


@pytest.mark.parametrize("lens", [False, True])
@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "gemma3", "llava", "florence2"])
def test_recompute_is_exact_with_an_exit_at_every_depth(name, lens, backbone, exits, batch, scored):
    """Of exits that keep keys and values of their own, and of such as keep none."""
    whole = backbone(name, wide=CALM)
    depths = tuple(range(1, whole.depth))
    parts = Exits(whole, depths, kind="lens") if lens else exits(name, wide=CALM, depths=depths)
    for rows, prefill in ((1, False), (4, False), *([(1, True), (4, True)] if lens else [])):
        scored(Dice(8))
        threshold = 0.75 if rows == 1 and not lens else 0.6
        policy = ExitPolicy(dict.fromkeys(depths, threshold), first=None if prefill else {})
        _, errors = errors_by_depth(whole, parts, batch(name, rows), policy)
        assert len(errors) >= 3
        assert max(errors.values()) <= EXACT, (rows, prefill, errors)


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "gemma3", "llava"])
@pytest.mark.parametrize(("score", "threshold"), [("margin", 0.01), ("idle", 0.93)])
def test_recompute_is_exact_whatever_the_score(
    score, threshold, name, backbone, exits, batch, idle
):
    whole = backbone(name, wide=CALM)
    parts = exits(name, wide=CALM, depths=tuple(range(1, whole.depth)))
    policy = ExitPolicy(dict.fromkeys(parts.depths, threshold), score=score)
    for rows in (1, 4):
        _, errors = errors_by_depth(whole, parts, batch(name, rows), policy)
        assert len(errors) >= 2 or rows == 1
        assert max(errors.values()) <= EXACT, (rows, errors)


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "gemma3", "llava"])
def test_recompute_is_exact_where_one_of_two_exits_is_off(name, backbone, exits, batch, scored):
    scored(Dice(5))
    whole, parts = backbone(name, wide=CALM), exits(name, wide=CALM)
    for on in parts.depths:
        _, errors = errors_by_depth(whole, parts, batch(name, 4), ExitPolicy({on: 0.3}))
        assert set(errors) >= {on} and max(errors.values()) <= EXACT, errors


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_runs(name, backbone, exits, batch, scored):
    half = torch.bfloat16
    whole, parts, inputs = backbone(name, half), exits(name, half), batch(name, 4, half)
    scored(Dice(5))
    policy = ExitPolicy(dict.fromkeys(parts.depths, 0.5))
    made = generate(whole, inputs, exits=parts, policy=policy, max_new_tokens=NEW)
    assert made.depths.shape == (4, NEW) and len(set(made.depths.flatten().tolist())) == 3


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_is_exact_though_a_lens_keeps_no_keys(name, backbone, batch, scored):
    scored(Dice(5))
    whole, inputs = backbone(name, wide=CALM), batch(name, 4)
    first, second = families.depths(name)
    exits, policy = (
        Exits(whole, (first, second), kind="lens"),
        ExitPolicy({first: 0.4, second: 0.5}),
    )
    _, errors = errors_by_depth(whole, exits, inputs, policy)
    assert set(errors) == {first, second, whole.depth}
    assert max(errors.values()) <= EXACT, errors
