"""Laws of the vision cache: the same answers, and no image goes through the tower twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import families
import pytest
import torch
from torch import nn

from offramp import ExitPolicy
from offramp.core.engine.generate import generate
from offramp.core.errors import InputError
from offramp.core.models.backbone import Backbone
from offramp.core.models.registry import Family
from offramp.features.vision_cache import VisionCache

Build = Callable[..., Any]
OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}


def calls_of(tower: nn.Module) -> list[int]:
    """A list that grows with each call of `tower`."""
    calls: list[int] = []
    tower.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("name", families.NAMES)
def test_an_image_goes_through_the_tower_once_and_answers_stay(name: str) -> None:
    backbone = Backbone(families.build(name))
    inputs = families.KINDS[name].inputs(1)
    plain = generate(backbone, inputs, **OPTIONS)
    cache, calls = VisionCache(), calls_of(backbone.vision)
    for _ in range(3):
        again = generate(backbone, inputs, vision_cache=cache, **OPTIONS)
        assert (again.sequences == plain.sequences).all()
    assert len(calls) == cache.misses  # some towers are called once for each size of an image
    assert cache.hits == 2 * cache.misses
    assert cache.nbytes > 0


def test_another_image_gets_its_own_features(backbone: Build, batch: Build) -> None:
    model, cache = backbone("llava"), VisionCache()
    one, other = batch("llava", 1), batch("llava", 1)
    other["pixel_values"] = other["pixel_values"].flip(-1)
    generate(model, one, vision_cache=cache, **OPTIONS)
    found = generate(model, other, vision_cache=cache, **OPTIONS)
    assert cache.hits == 0
    assert (found.sequences == generate(model, other, **OPTIONS).sequences).all()


def test_features_are_of_the_weights_as_they_are(batch: Build) -> None:
    model, cache, inputs = Backbone(families.build("llava")), VisionCache(), batch("llava", 1)
    generate(model, inputs, vision_cache=cache, **OPTIONS)
    with torch.no_grad():
        for parameter in model.vision.parameters():
            parameter.mul_(3.0)
    generate(model, inputs, vision_cache=cache, **OPTIONS)
    assert (cache.hits, cache.misses) == (0, 2)


def test_early_exits_and_lossless_drafts_share_it(
    backbone: Build, exits: Build, batch: Build
) -> None:
    model, trained, cache = backbone("blip2-t5"), exits("blip2-t5"), VisionCache()
    for lossless in (False, True):
        policy = ExitPolicy(dict.fromkeys(trained.depths, 0.2), lossless=lossless)
        given: dict[str, Any] = {"exits": trained, "policy": policy, **OPTIONS}
        plain = generate(model, batch("blip2-t5", 1), **given)
        found = generate(model, batch("blip2-t5", 1), vision_cache=cache, **given)
        assert (found.sequences == plain.sequences).all()
    assert (cache.misses, cache.hits) == (1, 1)


def test_the_model_is_left_as_it_was(backbone: Build, batch: Build) -> None:
    model = backbone("blip2-opt")
    before = model.vision
    generate(model, batch("blip2-opt", 1), vision_cache=VisionCache(), **OPTIONS)
    assert model.vision is before


def test_the_least_recently_used_goes_first() -> None:
    class Double(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    cache, tower = VisionCache(max_bytes=3 * 40), Double()
    a, b, c, d = (torch.full((10,), float(i)) for i in range(4))
    for x in (a, b, c, a, d):  # d pushes b out: a was asked for again
        cache.call(tower, (x,), {})
    hits = cache.hits
    assert cache.nbytes <= cache.max_bytes
    for x in (a, c, d):
        assert (cache.call(tower, (x,), {}) == 2 * x).all()
    assert cache.hits == hits + 3
    cache.call(tower, (b,), {})
    assert cache.hits == hits + 3


def test_what_is_larger_than_the_cache_is_not_kept() -> None:
    cache = VisionCache(max_bytes=8)
    tower = nn.Identity()
    assert (cache.call(tower, (torch.ones(100),), {}) == 1).all()
    assert cache.nbytes == 0


def test_a_cache_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="holds nothing"):
        VisionCache(0)


def test_a_family_without_a_known_tower_is_refused(
    backbone: Build, batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Backbone(families.build("llava"))
    model.family = Family("model.language_model")
    with pytest.raises(InputError, match="vision='path"):
        generate(model, batch("llava", 1), vision_cache=VisionCache(), **OPTIONS)
