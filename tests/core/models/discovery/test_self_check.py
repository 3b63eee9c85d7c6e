"""A backbone that is read wrongly is refused at load, with the part that showed it."""

from __future__ import annotations

from dataclasses import replace

import families
import pytest
import torch
import zoo

from offramp.core.errors import UnsupportedBackboneError
from offramp.core.models import registry
from offramp.core.models.backbone import Backbone
from offramp.core.models.discovery.paths import discover
from offramp.core.models.registry import Family

LLAVA = Family("model.language_model", vision="model.vision_tower")


def refused(monkeypatch, model, family, match):
    known = {**registry.FAMILIES, model.config.model_type: family}
    monkeypatch.setattr(registry, "FAMILIES", known)
    with pytest.raises(UnsupportedBackboneError, match=match) as caught:
        Backbone(model)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and ("register_backbone" in lines[1] or "docs/models.md" in lines[1])


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"norm": None}, "part 1"),
        ({"head": "model.multi_modal_projector.linear_2"}, "part 2"),
        ({"hidden_scale": 0.5}, "part 2"),
        ({"logit_scale": 2.0}, "part 2"),
        ({"suppressed": (7,)}, "part 2"),
        ({"stack": "model.nothing"}, "has no"),
        ({"vision": "model.nothing"}, "has no"),
        ({"layers": "norm"}, "not a list"),
        ({"head": "model.language_model.layers.0.mlp.up_proj"}, "inside the layers"),
    ],
    ids=str,
)
def test_a_registration_that_is_wrong_in_one_field_is_refused(wrong, match, monkeypatch):
    refused(monkeypatch, families.build("llava"), replace(LLAVA, **wrong), match)


def test_a_norm_of_another_name_is_missed_by_nothing(monkeypatch):
    """LFM2 calls its final norm `embedding_norm`."""
    refused(monkeypatch, zoo.build("lfm2_vl"), Family("model.language_model", norm=None), "part 1")


@pytest.mark.parametrize(
    "name", families.known("granite_docling", "muse_glimmer", "inkling_mm_model")
)
def test_a_factor_that_leaves_greedy_tokens_alone_is_missed_by_nothing(name, monkeypatch):
    model = zoo.build(name)
    right = discover(model)
    refused(monkeypatch, model, replace(right, logit_scale=1.0, hidden_scale=None), "part 2")


@pytest.mark.parametrize("name", ["blip2-t5", "instructblip-t5", "florence2", "qwen3-vl", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_right_registration_passes_in_every_precision(name, dtype):
    whole = Backbone(families.build(name, dtype))
    assert whole.width == families.WIDTH and whole.vocabulary == families.VOCABULARY
