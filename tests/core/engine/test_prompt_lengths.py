"""Prompts of 40 and 320 tokens get the model's own answers, texts and images, whichever comes
first; those of 10 are everywhere else."""

from __future__ import annotations

from functools import partial
from typing import Any

import families
import pytest
import torch

from offramp.core.decoding.policy import ExitPolicy
from offramp.core.engine.generate import generate
from offramp.core.models.backbone import Backbone
from offramp.serving.core import EngineCore
from offramp.serving.engine_config import EngineConfig
from offramp.serving.request import Request

OPTIONS = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": families.WORDLESS}
LONG = ("llava", "gemma3", "qwen2.5-vl", "blip2-t5")
"""Rotary positions, windows, positions on three axes, relative ones."""


def lengthened(inputs: dict[str, Any], length: int) -> dict[str, Any]:
    """The prompt with words after it."""
    more = max(0, length - inputs["input_ids"].shape[1])
    place = torch.arange(more)[None]
    fill = {
        "input_ids": families.FIRST_WORD + (place * place + place // 3) % 50,
        "attention_mask": torch.ones_like(place),
        "mm_token_type_ids": torch.zeros_like(place),
        "token_type_ids": torch.zeros_like(place),
    }
    return {
        name: torch.cat([value, fill[name].to(value)], 1) if name in fill else value
        for name, value in inputs.items()
    }


def by_generate(whole: Any, exits: Any, policy: Any, prompts: Any) -> list[Any]:
    write = partial(generate, whole, exits=exits, policy=policy, **OPTIONS)
    return [write(each).sequences for each in prompts]


def by_engine(whole: Any, exits: Any, policy: Any, prompts: Any) -> list[Any]:
    """Read in chunks, and written side by side."""
    core = EngineCore(whole, exits, policy, EngineConfig(slots=2, limit=400, budget=64))
    handles = [core.add(Request(each, "lossless", options=OPTIONS)) for each in prompts]
    core.run()
    return [handle.result(timeout=0).output.sequences for handle in handles]


@pytest.mark.parametrize("door", [by_generate, by_engine], ids=["generate", "engine"])
@pytest.mark.parametrize(
    ("name", "length"), [(n, 40) for n in families.NAMES] + [(n, 320) for n in LONG]
)
def test_answers_are_the_models_own_at_every_length(
    name: str, length: int, door: Any, exits: Any, batch: Any
) -> None:
    whole = Backbone(families.build(name))
    shown = families.one_row(name, batch(name, 1), 0)
    prompts = [lengthened(shown, length)]
    words = {n: shown[n][:, -2:] for n in ("input_ids", "attention_mask")}
    try:
        whole.model.generate(**words, max_new_tokens=1)
    except Exception:  # these answer no text alone
        pass
    else:
        prompts.insert(0, lengthened(words, length))
    if door is by_engine:
        prompts.reverse()
    policy = ExitPolicy({2: 0.02}, lossless=True, max_draft=3)
    answers = door(whole, exits(name), policy, prompts)
    for inputs, answer in zip(prompts, answers, strict=True):
        own = whole.model.generate(**inputs, **OPTIONS)
        assert torch.equal(answer[0, -6:], own[0, -6:])
