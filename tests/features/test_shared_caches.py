"""Caches shared by threads and by models: every answer is the one that the model gives without."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import families
import pytest
import torch
from torch import nn

from offramp.core.engine.generate import generate
from offramp.core.models.backbone import Backbone
from offramp.features.prefix_cache import PrefixCache
from offramp.features.vision_cache import VisionCache

OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
THREADS = 8


@pytest.mark.slow
def test_eight_threads_share_both_caches() -> None:
    model = Backbone(families.build("blip2-opt"))
    prompts = [families.KINDS["blip2-opt"].inputs(1, seed=seed) for seed in range(6)]
    plain = [generate(model, prompt, **OPTIONS).sequences for prompt in prompts]
    vision, prefix = VisionCache(4000), PrefixCache(2)  # so small that both drop all the time

    def answer(number: int) -> bool:
        index = number % len(prompts)
        found = generate(model, prompts[index], vision_cache=vision, prefix_cache=prefix, **OPTIONS)
        return torch.equal(found.sequences, plain[index])

    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(answer, range(12 * THREADS)))
    assert vision.hits + vision.misses == 12 * THREADS
    assert prefix.reused > 0 and 0 < vision.nbytes <= 4000


def test_a_prompt_that_is_looked_at_is_not_used() -> None:
    model = Backbone(families.build("blip2-opt"))
    first, *others = (families.KINDS["blip2-opt"].inputs(1, seed=seed) for seed in range(4))
    cache = PrefixCache(3)
    for prompt in (first, *others[:2], first, others[2]):  # the first is used last but one
        generate(model, prompt, prefix_cache=cache, **OPTIONS)
    before = cache.reused
    generate(model, first, prefix_cache=cache, **OPTIONS)
    assert cache.reused > before


def test_one_model_is_never_given_anothers_image_features() -> None:
    models = [Backbone(families.build("blip2-opt", seed=seed)) for seed in (0, 1)]
    inputs, cache = families.KINDS["blip2-opt"].inputs(1), VisionCache()
    for model in models:
        plain = generate(model, inputs, **OPTIONS)
        shared = generate(model, inputs, vision_cache=cache, **OPTIONS)
        assert torch.equal(shared.sequences, plain.sequences)
    assert cache.hits == 0 and cache.misses == 2


def test_a_tower_that_is_gone_is_not_mistaken_for_a_new_one() -> None:
    cache = VisionCache()
    for _ in range(20):  # a new module often lies where the last one lay
        tower = nn.Linear(4, 4)
        found = cache.call(tower, (torch.ones(1, 4),), {})
        assert torch.equal(found, tower(torch.ones(1, 4)))
        del tower
    assert cache.hits == 0


def test_two_backbones_of_one_model_share_its_prompts() -> None:
    model, cache = families.build("blip2-opt"), PrefixCache()
    inputs = families.KINDS["blip2-opt"].inputs(1)
    for _ in range(2):  # a Hugging Face model is wrapped anew in each call
        generate(model, inputs, prefix_cache=cache, **OPTIONS)
    assert cache.reused > 0


@pytest.mark.parametrize("wrong", ["blip2", None, 3])
def test_what_is_no_model_is_a_clear_error(wrong: Any) -> None:
    with pytest.raises(ValueError, match="is no vision-language model"):
        generate(wrong, {}, **OPTIONS)
