"""Part 3 of the self-check tells what a model can do with exits."""

from __future__ import annotations

import families
import pytest
import torch
import zoo

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.engine.generate import generate
from offramp.core.errors import OfframpError, UnsupportedBackboneError
from offramp.core.models import registry
from offramp.core.models.backbone import Backbone
from offramp.core.models.discovery.paths import discover
from offramp.core.models.exits import Exits
from offramp.core.models.registry import Family
from offramp.features.self_check import adopt_findings, check_decoding


def checked(name, rows=1):
    model = zoo.build(name)
    whole = Backbone(model, example=zoo.inputs(name, model, 1))
    return whole, check_decoding(whole, zoo.inputs(name, model, rows), depths=(2, 4))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["blip", "lfm2_vl", "chameleon", "exaone4_5"])
def test_all_of_decoding_is_the_models_own(name, rows):
    _, found = checked(name, rows)
    outcomes = (found.plain, found.exits, found.first_token, found.lossless)
    assert all(map(found.holds, outcomes)), found


@pytest.mark.slow
def test_a_batch_of_more_rows_than_tokens_is_checked_as_few_are():
    _, found = checked("lfm2_vl", 12)
    assert all(map(found.holds, (found.plain, found.exits, found.lossless))), found


def test_a_cross_attention_layer_is_no_exit_and_keeps_the_images_keys():
    """Mllama: layer 4 attends to the image alone, so an exit at depth 4 is copied from layer 5."""
    whole, found = checked("mllama", 3)
    kinds = {type(Exits(whole, (4,)).at(4)), type(whole.layers[5])}
    assert len(kinds) == 1 and kinds != {type(whole.layers[4])}
    assert all(map(found.holds, (found.plain, found.exits, found.lossless))), found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_5", "nemotron_h_omni"])
def test_recurrent_states_decode_with_exits_and_refuse_lossless(name):
    whole, found = checked(name, 3)
    assert found.holds(found.plain) and found.holds(found.exits), found
    assert str(found.lossless).startswith("refused"), found
    inputs = zoo.inputs(name, whole.model, 1)
    policy = ExitPolicy({2: 0.5}, lossless=True)
    with pytest.raises(OfframpError, match="takes drafts back"):
        generate(whole, inputs, exits=Exits(whole, (2,)), policy=policy, max_new_tokens=4)


def test_what_others_register_is_checked_before_it_is_trained(monkeypatch):
    """Of a prefix language model, the default says wrongly that its prompt is causal."""
    model = zoo.build("gemma4_unified")
    found = discover(model, zoo.inputs("gemma4_unified", model, 1))
    family = Family(found.stack, found.layers, found.norm, found.head)
    monkeypatch.setattr(registry, "FAMILIES", {**registry.FAMILIES, "gemma4_unified": family})
    whole = Backbone(model)
    assert whole.family.causal_prompt and not whole.tested
    adopt_findings(whole, check_decoding(whole, zoo.inputs("gemma4_unified", model, 1)))
    assert not whole.family.causal_prompt


@pytest.mark.parametrize("name", families.NAMES)
def test_a_prompt_that_looks_ahead_is_told_from_one_that_does_not(name, batch):
    whole = Backbone(families.build(name))
    depth = 1 if name == "qwen3-vl" else 2  # where visual features still join
    found = check_decoding(whole, batch(name, 1), depths=(depth, 4))
    assert found.holds(found.plain) and found.holds(found.exits), found
    assert found.holds(found.first_token) == (name not in families.LOOKS_AHEAD), found


@pytest.mark.slow
def test_layers_that_read_the_tokens_again_get_those_that_wait():
    """Gemma 4 adds an embedding of the token in every layer."""
    _, found = checked("gemma4", 3)
    assert found.holds(found.exits) and found.holds(found.lossless), found


@pytest.mark.slow
@pytest.mark.parametrize("name", families.known("mistral_large4", "qwen4_exp"))
def test_a_model_whose_decoding_is_not_its_own_is_refused_in_two_lines(name):
    whole, found = checked(name)
    with pytest.raises(UnsupportedBackboneError, match="part 3") as caught:
        adopt_findings(whole, found)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_router_with_noise_is_refused_in_every_precision(dtype):
    """A token that goes to another expert is not rounding, however little its logits differ."""
    model = zoo.build("qwen3_vl_moe")
    routers = [part for name, part in model.named_modules() if name.endswith("mlp.gate")]

    class Jitter(type(routers[0])):
        def forward(self, states):
            return super().forward(states * (1 + 0.01 * torch.randn_like(states)))

    inputs = zoo.inputs("qwen3_vl_moe", model, 1)
    inputs = {n: v.to(dtype) if v.is_floating_point() else v for n, v in inputs.items()}
    for noisy in (False, True):
        for router in routers if noisy else ():
            router.__class__ = Jitter
        whole = Backbone(model.to(dtype), example=inputs)
        for seed in range(2 if noisy else 1):
            torch.manual_seed(seed)
            assert check_decoding(whole, inputs, depths=(2, 4)).exact != noisy


@pytest.mark.slow
def test_what_held_is_taken_over(batch):
    whole = Backbone(families.build("gemma3"))
    adopt_findings(whole, check_decoding(whole, batch("gemma3", 1)))
    assert not whole.family.causal_prompt and whole.lossless
    model = zoo.build("aya_vision")
    found = Backbone(model)
    assert not found.family.causal_prompt  # not known before an image was seen
    adopt_findings(found, check_decoding(found, zoo.inputs("aya_vision", model, 1)))
    assert found.family.causal_prompt


@pytest.mark.slow
def test_lossless_is_refused_in_two_lines_where_drafts_cannot_be_taken_back():
    model = zoo.build("inkling_mm_model")
    whole, inputs = Backbone(model), zoo.inputs("inkling_mm_model", model, 1)
    adopt_findings(whole, check_decoding(whole, inputs))
    exits = Exits(whole, (1,)).requires_grad_(False)
    with pytest.raises(UnsupportedBackboneError, match="drafts") as caught:
        generate(whole, inputs, exits=exits, policy=ExitPolicy({1: 0.5}, lossless=True))
    assert len(str(caught.value).splitlines()) == 2
    generate(whole, inputs, exits=exits, policy=ExitPolicy({1: 0.5}), max_new_tokens=2)


def test_an_adapter_remembers_what_decoding_showed_of_a_discovered_backbone(tmp_path):
    model = zoo.build("aya_vision")
    whole = Backbone(model)
    adopt_findings(whole, check_decoding(whole, zoo.inputs("aya_vision", model, 1)))
    whole.lossless = False
    Adapter(whole, Exits(whole, (1,))).save(tmp_path / "exits")
    fresh = Backbone(model)
    assert not fresh.family.causal_prompt and fresh.lossless
    Adapter.load(tmp_path / "exits", fresh)
    assert fresh.family.causal_prompt and not fresh.lossless
