"""Adapters on tiny backbones that llama.cpp can run, and what is asked of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import families
import pytest
import torch

from offramp.adapter import Adapter
from offramp.engine.policy import ExitPolicy
from offramp.models.backbone import Backbone
from offramp.models.exits import Exits, ExitSet
from offramp.models.shortlist import Gate

KINDS = ("llava", "blip2-llama", "smolvlm", "internvl", "internvl-qwen3")
DEPTHS = (2, 4)
NEW = 16
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
SHORT = torch.arange(8, 96, 2)


@cache
def adapter_of(name: str) -> Adapter:
    """Exits at two depths that let tokens exit now and then, with a shortlist and a gate."""
    backbone = Backbone(families.build(name), name=name)
    exits = Exits(backbone, DEPTHS)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in exits.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=draw))
    exits.requires_grad_(False)
    gate = Gate(torch.randn(backbone.width, generator=draw), torch.tensor(0.0))
    together = ExitSet(exits, SHORT, {2: gate})
    return Adapter(backbone, together, ExitPolicy(dict.fromkeys(DEPTHS, 0.5), shortlist=True))


def inputs_of(name: str, seed: int = 0) -> dict[str, Any]:
    return families.kind_of(name).inputs(1, seed)


def same(ours: Any, theirs: Any) -> bool:
    return torch.equal(ours.sequences, theirs.sequences) and torch.equal(ours.depths, theirs.depths)


def refused(call: Callable[[], Any], kind: type[Exception], word: str) -> None:
    """The call fails in two lines that hold `word`."""
    with pytest.raises(kind) as error:
        call()
    assert len(str(error.value).splitlines()) == 2 and word in str(error.value)
