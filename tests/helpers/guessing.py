"""A tiny model whose answers soon end, with exits that often agree with it, and often do not."""

from __future__ import annotations

from functools import cache
from typing import Any

import fakes
import families

from offramp.adapter.adapter import Adapter
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits
from offramp.core.models.stand_in import StandIn
from offramp.features.input_processor import InputProcessor
from offramp.features.vision_engine import IN_BF16

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
    return _adapter(encoder().backbone, kind)


def rounding(kind: str) -> tuple[Adapter, InputProcessor]:
    """The same behind a vision tower that rounds."""
    plain = encoder().backbone
    assert plain.vision is not None
    backbone = plain.with_tower(Rounding(IN_BF16, plain.vision))
    return _adapter(backbone, kind), InputProcessor(backbone, encoder().processor)


class Rounding(StandIn):
    """Features of one decimal."""

    def forward(self, *args: Any, **kw: Any) -> Any:
        made = self.tower(*args, **kw)
        made.last_hidden_state = made.last_hidden_state.round(decimals=1)
        return made


def _adapter(backbone: Backbone, kind: str) -> Adapter:
    exits = Exits(backbone, (4,), kind=kind)
    families.perturb(exits)
    return Adapter(backbone, exits.requires_grad_(False), seen={"train": []})
