"""Adapters on tiny backbones that llama.cpp can run, and what is asked of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import families
import pytest
import torch

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet
from offramp_llama_cpp.segment import EngineOptions

KINDS = ("llava", "blip2-llama", "smolvlm", "internvl", "internvl-qwen3")
FURTHER = (
    "qwen2-vl",
    "qwen2.5-vl",
    "qwen3-vl",
    "qwen3-vl-experts",
    "internvl-experts",
    "gemma3",
    "paligemma",
    "paligemma2-wide",
    "granite",
    "blip2-opt",
)
"""Those whose rows have several positions, look ahead, go through windows or to experts, or whose
graph in llama.cpp is not quite theirs."""
DEPTHS = (2, 4)
_OTHER_DEPTHS = {"qwen3-vl": (2, 5), "paligemma2-wide": (2, 5), "gemma3": (2, 7)}
"""In the first, features join below and above the first exit; in the others the last segment has
layers of one kind alone."""
NEW = 16
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
ENDS = {**GREEDY, "eos_token_id": [*range(0, families.VOCABULARY, 3)], "pad_token_id": 0}
"""So many end tokens that untrained models soon say one."""
EXACT = EngineOptions(context=256, cache="f32", flash_attention=False)
"""As near to PyTorch in float32 as llama.cpp comes."""
SHORT = torch.arange(8, 96, 2)


@cache
def adapter_of(name: str) -> Adapter:
    """Exits at two depths that let tokens exit now and then, with a shortlist."""
    backbone = Backbone(families.build(name), name=name)
    depths = depths_of(name)
    exits = Exits(backbone, depths)
    families.perturb(exits)
    exits.requires_grad_(False)
    together = ExitSet(exits, SHORT)
    return Adapter(backbone, together, ExitPolicy(dict.fromkeys(depths, 0.5), shortlist=True))


def seen_by_mtmd(name: str) -> Adapter:
    """Windows of Qwen2.5-VL's tower are as wide as in all its checkpoints: libmtmd takes no
    others."""
    if name != "qwen2.5-vl":
        return adapter_of(name)
    adapter = adapter_of.__wrapped__(name)
    model = adapter.backbone.model
    model.model.visual.window_size = model.config.vision_config.window_size = 112
    return adapter


def drafting(adapter: Adapter) -> Adapter:
    """The same exits, which draft on, the deepest by what it learnt."""
    backbone, plain = adapter.backbone, adapter.exits
    exits = Exits(backbone, plain.depths, kind="drafting")
    exits.load_state_dict(plain.modules.state_dict(), strict=False)
    exits.requires_grad_(False)
    policy = replace(adapter.policy, drafts=dict.fromkeys(plain.depths, 0.0), max_draft=3)
    return replace(adapter, exits=ExitSet(exits, SHORT), policy=replace(policy, lossless=True))


def depths_of(name: str) -> tuple[int, ...]:
    return _OTHER_DEPTHS.get(name, DEPTHS)


def inputs_of(name: str, seed: int = 0) -> dict[str, Any]:
    return families.kind_of(name).inputs(1, seed)


def two_images(name: str) -> dict[str, Any]:
    """One prompt: an image, words, another image, other words."""
    inputs = families.kind_of(name).inputs(2)
    rows = [families.one_row(name, inputs, row) for row in range(2)]
    long = rows[0]["input_ids"].shape[1]

    def along(value: torch.Tensor) -> int:
        return int(value.dim() == 2 and value.shape[-1] == long)

    return {k: torch.cat([row[k] for row in rows], along(v)) for k, v in rows[0].items()}


def same(ours: Any, theirs: Any) -> bool:
    return torch.equal(ours.sequences, theirs.sequences) and torch.equal(ours.depths, theirs.depths)


def refused(call: Callable[[], Any], kind: type[Exception], word: str) -> None:
    """The call fails in two lines that hold `word`."""
    with pytest.raises(kind) as error:
        call()
    assert len(str(error.value).splitlines()) == 2 and word in str(error.value)
