"""Watching a few greedy steps finds the decoder of models that nobody registered."""

from __future__ import annotations

import families
import pytest
import zoo

from offramp.core.errors import UnsupportedBackboneError
from offramp.core.models.backbone import Backbone
from offramp.core.models.discovery.paths import discover
from offramp.core.models.registry import registered_family

FOUND = {
    "chameleon": ("model", "layers", "norm", "lm_head"),
    "fuyu": ("model.language_model", "layers", "final_layernorm", "lm_head"),
    "git": ("git", "encoder.layer", None, "output"),
    "kosmos-2": ("text_model.model", "layers", "layer_norm", "text_model.lm_head"),
    "lfm2_vl": ("model.language_model", "layers", "embedding_norm", "lm_head"),
    "nemotron_h_omni": ("language_model.model", "layers", "norm_f", "language_model.lm_head"),
    "t5gemma2": ("model.decoder", "layers", "norm", "lm_head.out_proj"),
}
REFUSED = {
    "hy_v4_vl": "another axis",
    "idefics": "side by side",
    "inkling2": "under one norm",
    "pix2struct": "part 1",
}


def paths(family):
    return family.stack, family.layers, family.norm, family.head


@pytest.mark.parametrize("name", families.NAMES)
def test_a_registered_family_is_found_as_it_is_registered(name, batch):
    model = families.build(name)
    found, known = discover(model, batch(name, 1)), registered_family(model.config)
    assert (*paths(found), found.vision) == (*paths(known), known.vision)
    scale = known.hidden_scale
    expected = scale(model.language_model.config) if callable(scale) else None
    assert found.hidden_scale == pytest.approx(None if expected == 1.0 else expected)


@pytest.mark.parametrize("name", FOUND)
def test_an_unregistered_type_is_found(name):
    model = zoo.build(name)
    assert paths(discover(model, zoo.inputs(name, model, 1))) == FOUND[name]


@pytest.mark.parametrize("name", families.known("granite_docling", "muse_glimmer"))
def test_a_factor_on_the_logits_is_the_one_of_the_configuration(name):
    model = zoo.build(name)
    text = model.config.text_config
    exact = text.output_multiplier if name == "muse_glimmer" else 1 / text.logits_scaling
    assert discover(model).logit_scale == exact != 1.0


def test_tokens_that_are_never_said_are_found():
    model = zoo.build("chameleon")
    images = set(model.model.vocabulary_mapping.image_tokens)
    assert set(discover(model).suppressed) == images and images


@pytest.mark.parametrize("name", families.known(*REFUSED))
def test_what_is_not_one_chain_of_layers_is_refused_in_two_lines(name):
    model = zoo.build(name)
    with pytest.raises(UnsupportedBackboneError, match=REFUSED[name]) as caught:
        Backbone(model, example=zoo.inputs(name, model, 1))
    assert len(str(caught.value).splitlines()) == 2


def test_a_model_that_does_not_generate_is_refused():
    with pytest.raises(UnsupportedBackboneError, match="does not generate"):
        discover(zoo.build("pi0"))


def test_watching_leaves_the_model_as_it_was():
    model = zoo.build("aya_vision")
    before = [(id(m), len(m._forward_hooks), "forward" in vars(m)) for m in model.modules()]
    discover(model)
    assert [(id(m), len(m._forward_hooks), "forward" in vars(m)) for m in model.modules()] == before
