"""A tiny random model of every type that transformers' image-text-to-text auto class knows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny_families as families
import torch
from tiny_families.text import BOS, PAD, VOCABULARY
from torch import Tensor

from zoo.config import FIRST_WORD, shrink
from zoo.inputs import IMAGES, by_signature

PROMPTS = (6, 3, 5)
"""Words in each row's prompt: rows of a batch need padding."""
CHANGES: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("types.json").read_text(encoding="utf-8")
)
"""What the rules of `zoo.config` do not guess, laid over the tiny configuration."""


def names() -> tuple[str, ...]:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as known,
    )

    return tuple(known)


def config(name: str) -> Any:
    from transformers import CONFIG_MAPPING

    known = CONFIG_MAPPING[name]
    return known.from_dict(_merge(shrink(known().to_dict()), CHANGES.get(name, {})))


def _merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    whole = dict(old)
    for name, value in new.items():
        inside = whole.get(name)
        deep = name not in ("per_layer_config", "vocabulary_map")
        if deep and isinstance(value, Mapping) and isinstance(inside, Mapping):
            whole[name] = _merge(inside, value)
        else:
            whole[name] = value
    return whole


AS_BEFORE = {
    **{name: name for name in ("llava", "idefics3", "smolvlm", "paligemma", "gemma3")},
    **{name: name for name in ("internvl", "florence2")},
    **{name: name.replace("_", "-") for name in ("llava_next", "qwen2_vl", "qwen3_vl")},
    "blip-2": "blip2-opt",
    "instructblip": "instructblip-opt",
    "qwen2_5_vl": "qwen2.5-vl",
    "shieldgemma2": "gemma3",
}
"""Types that `families` builds by hand."""


def build(name: str, seed: int = 0, wide: float = 0.25) -> Any:
    from transformers import AutoModelForImageTextToText

    if name in AS_BEFORE:
        return families.build(AS_BEFORE[name], seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = AutoModelForImageTextToText.from_config(config(name))  # type: ignore[no-untyped-call]
        families.draw_weights(model, wide, 0.1)
    for part in model.modules():
        settings = getattr(part, "generation_config", None)
        if settings is not None:
            settings.eos_token_id = None
            settings.pad_token_id = PAD
            if settings.bos_token_id is None:
                settings.bos_token_id = BOS
            if model.config.is_encoder_decoder and settings.decoder_start_token_id is None:
                settings.decoder_start_token_id = BOS
    return model.float().eval()


def inputs(name: str, model: Any, rows: int, seed: int = 0) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(100 + seed)
        words = [
            torch.randint(FIRST_WORD, VOCABULARY, (PROMPTS[r % 3],)).tolist() for r in range(rows)
        ]
        if name in AS_BEFORE:
            return families.KINDS[AS_BEFORE[name]].inputs(rows, seed)
        return IMAGES.get(name, by_signature)(model, words)
