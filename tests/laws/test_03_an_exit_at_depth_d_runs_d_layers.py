"""Law 3: exiting at depth d runs exactly d decoder layers."""

from __future__ import annotations

import families
import pytest
from decoding import NEW, always, tokens_by_layer
from families import CAUSAL_PROMPT, LOOKS_AHEAD, NAMES
from reference import Dice, Script

from offramp.core.decoding.policy import ExitPolicy
from offramp.core.engine.generate import generate
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits


def mixed(whole, name, inputs, scored):
    """A generation of one row whose tokens exit at the first exit, the second and not at all."""
    scored(Dice(3))
    first, second = families.depths(name)
    exits = Exits(whole, (first, second))
    policy = ExitPolicy({first: 0.5, second: 0.5})
    made, counts = tokens_by_layer(
        whole,
        lambda: generate(
            whole, inputs, exits=exits, policy=policy, max_new_tokens=16, do_sample=False
        ),
    )
    assert set(made.depths.flatten().tolist()) == {first, second, whole.depth}
    return made.depths[0].tolist(), counts


def prompt_and_steps(whole, depths, inputs):
    """Tokens of a prompt that runs whole, and depths of the tokens that may exit."""
    if whole.is_encoder_decoder:
        return 0, depths
    return inputs["input_ids"].shape[1], depths[1:]


@pytest.mark.parametrize("name", NAMES)
def test_under_recompute_a_skipped_layer_runs_only_when_a_later_token_needs_it(name, batch, scored):
    whole = Backbone(families.build(name))
    inputs = batch(name, 1)
    depths, counts = mixed(whole, name, inputs, scored)
    prompt, steps = prompt_and_steps(whole, depths, inputs)
    # Up to the last token that went through a layer, every token did, once; after it, none.
    for i, count in enumerate(counts):
        assert count == prompt + max((t + 1 for t, d in enumerate(steps) if d > i), default=0)


@pytest.mark.parametrize("lens", [False, True])
def test_if_every_token_exits_the_deeper_layers_see_the_prompt_only(lens, batch):
    whole = Backbone(families.build("llava"))
    inputs = batch("llava", 1)
    exits = Exits(whole, (2,), kind="lens" if lens else "layer")
    policy = ExitPolicy({2: 0.0}, first={})
    made, counts = tokens_by_layer(
        whole, lambda: generate(whole, inputs, exits=exits, policy=policy, max_new_tokens=9)
    )
    prompt = inputs["input_ids"].shape[1]
    assert made.depths.tolist() == [[6] + [2] * 8]
    assert counts == [prompt + 8] * 2 + [prompt] * 4


@pytest.mark.parametrize("name", CAUSAL_PROMPT)
def test_if_the_prompt_exits_too_the_deeper_layers_see_nothing(name, batch):
    whole = Backbone(families.build(name))
    exits, policy = Exits(whole, (2,)), ExitPolicy({2: 0.0})
    inputs = batch(name, 1)
    made, counts = tokens_by_layer(
        whole, lambda: generate(whole, inputs, exits=exits, policy=policy, max_new_tokens=5)
    )
    assert made.depths.tolist() == [[2] * 5]
    assert counts[2:] == [0] * 4


@pytest.mark.parametrize("name", CAUSAL_PROMPT)
@pytest.mark.parametrize("deep", [None, 0, 2])
def test_visual_tokens_reach_deep_layers_only_where_a_token_needs_them(name, deep, batch, scored):
    """The first token has a threshold of its own; `deep`: which token does not reach its own."""
    whole, inputs = Backbone(families.build(name)), batch(name, 1)
    sure = [0.6, 0.3, 0.3, 0.3]  # a score of 0.6 is enough for the first token, 0.3 for others
    if deep is not None:
        sure[deep] = 0.5 if deep == 0 else 0.1
    scored(Script(sure))
    policy = ExitPolicy({2: 0.2}, first={2: 0.6})
    made, counts = tokens_by_layer(
        whole,
        lambda: generate(whole, inputs, exits=Exits(whole, (2,)), policy=policy, max_new_tokens=4),
    )
    depths = [6 if place == deep else 2 for place in range(4)]
    assert made.depths.tolist() == [depths]
    prompt = counts[0] - 3
    assert whole.is_encoder_decoder or prompt >= inputs["input_ids"].shape[1]
    assert counts[2:] == [0 if deep is None else prompt + deep] * 4


@pytest.mark.parametrize("name", LOOKS_AHEAD)
def test_a_prompt_that_looks_ahead_runs_at_full_depth(name, backbone, exits, batch):
    policy = ExitPolicy(always(name).thresholds)
    made = generate(
        backbone(name), batch(name, 1), exits=exits(name), policy=policy, max_new_tokens=3
    )
    first, whole = families.depths(name)[0], backbone(name).depth
    assert made.depths.tolist() == [[whole, first, first]]


def test_an_exit_switched_off_is_not_even_computed(batch):
    whole = Backbone(families.build("llava"))
    exits = Exits(whole, (2, 4))
    ran = []
    exits.at(2).register_forward_hook(lambda *_: ran.append(2))
    exits.at(4).register_forward_hook(lambda *_: ran.append(4))
    generate(whole, batch("llava", 1), exits=exits, policy=ExitPolicy({4: 1.0}), max_new_tokens=3)
    assert set(ran) == {4}


@pytest.mark.parametrize("name", NAMES)
def test_an_exit_that_keeps_no_keys_skips_layers_like_any_other(name, backbone, batch, scored):
    whole = backbone(name)
    first, second = families.depths(name)
    lens = Exits(whole, (first, second), kind="lens")
    scored(Dice(3))
    policy = ExitPolicy({first: 0.5, second: 0.5})
    made = generate(whole, batch(name, 4), exits=lens, policy=policy, max_new_tokens=NEW)
    assert set(made.depths.flatten().tolist()) == {first, second, whole.depth}
