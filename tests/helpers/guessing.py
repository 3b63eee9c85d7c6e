"""A tiny model whose answers soon end, with exits that often agree with it, and often do not."""

from __future__ import annotations

from functools import cache
from typing import Any

import fakes
import families

from offramp.adapter.adapter import Adapter
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits
from offramp.features.input_processor import InputProcessor

OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


@cache
def encoder() -> InputProcessor:
    model = families.build("blip2-opt", wide=2.0)
    ends = [families.EOS, *range(10, families.VOCABULARY, 3)]  # untrained models soon say one
    model.language_model.generation_config.eos_token_id = ends
    return InputProcessor(Backbone(model), fakes.Blip2FakeProcessor("blip2-opt"))


@cache
def adapter(kind: str) -> Adapter:
    """With an exit of the kind at depth 4."""
    exits = Exits(encoder().backbone, (4,), kind=kind)
    families.perturb(exits)
    return Adapter(encoder().backbone, exits.requires_grad_(False), seen={"train": []})
