"""Laws of prompts that are kept: of this backbone, and whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import families
import torch
from families import one_row

from offramp.engine.generate import generate
from offramp.engine.prefix_cache import PrefixCache, _Kept
from offramp.models.backbone import Backbone

GREEDY = {"max_new_tokens": 4, "do_sample": False}


def test_a_prompt_of_another_backbone_is_not_taken(backbone: Callable[..., Any]) -> None:
    ours, other = backbone("llava"), Backbone(families.build("llava"))
    cache, embeds = PrefixCache(), torch.randn(6, ours.width)
    cache.keep(_Kept(ours, embeds, [], [], None))
    assert cache.best(ours, [], embeds)[1] == 5
    assert cache.best(other, [], embeds) == (None, 0)


def test_a_padded_prompt_is_run_whole_and_not_kept(
    backbone: Callable[..., Any], batch: Callable[..., Any]
) -> None:
    model = backbone("llava")
    row = one_row("llava", batch("llava", 2), 0)
    text = {"input_ids": row["input_ids"][:, :6].clamp(max=5) + 3}
    whole = torch.ones_like(text["input_ids"])
    padded = whole.clone()
    padded[:, :2] = 0
    cache = PrefixCache()
    generate(model, {**text, "attention_mask": whole}, prefix_cache=cache, **GREEDY)
    held, reused = len(cache._held), cache.reused
    assert held == 1
    asked = {**text, "attention_mask": padded}
    alone = generate(model, asked, **GREEDY).sequences
    assert torch.equal(generate(model, asked, prefix_cache=cache, **GREEDY).sequences, alone)
    assert (len(cache._held), cache.reused) == (held, reused)
    generate(model, {**text, "attention_mask": whole}, prefix_cache=cache, **GREEDY)
    assert cache.reused > reused
