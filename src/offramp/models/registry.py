"""Families of vision-language models, as data: the one place that knows Hugging Face model classes.

A `Family` says where the decoder stack, its layers, its final norm and the LM head are; everything
else works on any family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from offramp.errors import UnsupportedBackboneError, did_you_mean


@dataclass(frozen=True)
class Family:
    """Where a model family keeps its language decoder. Paths are dotted, from the VLM.

    stack: the module whose `forward` loops over the decoder layers.
    layers, norm: attributes of the stack; `norm=None` where the stack ends without one.
    head: the LM head.
    hidden_scale: factor on the normed state before the head, from the text config (T5 ties).
    vision: the vision tower, which reads the image and nothing else.
    causal_prompt: False where prompt tokens also look ahead (PaliGemma, Gemma 3) or where visual
        features join between layers (Qwen3-VL); the prompt then always runs at full depth.
    """

    stack: str
    layers: str = "layers"
    norm: str | None = "norm"
    head: str = "lm_head"
    vision: str | None = None
    hidden_scale: Callable[[Any], float] | None = None
    causal_prompt: bool = True

    def inside(self, prefix: str, vision: str | None) -> Family:
        """This text family, held under `prefix` by a model with the vision tower `vision`."""
        stack, head = f"{prefix}.{self.stack}", f"{prefix}.{self.head}"
        return replace(self, stack=stack, head=head, vision=vision)


def _t5_scale(config: Any) -> float:
    tied = getattr(config, "scale_decoder_outputs", getattr(config, "tie_word_embeddings", False))
    return float(config.d_model) ** -0.5 if tied else 1.0


TEXT_FAMILIES: dict[str, Family] = {
    "opt": Family("model.decoder", norm="final_layer_norm"),
    "llama": Family("model"),
    "t5": Family("decoder", layers="block", norm="final_layer_norm", hidden_scale=_t5_scale),
}
"""Language models that a wrapper such as BLIP-2 holds whole, by `model_type`."""

FAMILIES: dict[str, Family | str] = {
    "blip-2": "language_model",  # a string: the text model under that name, from TEXT_FAMILIES
    "instructblip": "language_model",
    "llava": Family("model.language_model", vision="model.vision_tower"),
    "llava_next": Family("model.language_model", vision="model.vision_tower"),
    "idefics3": Family("model.text_model", vision="model.vision_model"),
    "smolvlm": Family("model.text_model", vision="model.vision_model"),
    "qwen2_vl": Family("model.language_model", vision="model.visual"),
    "qwen2_5_vl": Family("model.language_model", vision="model.visual"),
    "qwen3_vl": Family("model.language_model", vision="model.visual", causal_prompt=False),
    "paligemma": Family("model.language_model", vision="model.vision_tower", causal_prompt=False),
    "gemma3": Family("model.language_model", vision="model.vision_tower", causal_prompt=False),
    "internvl": Family("model.language_model", vision="model.vision_tower"),
    "florence2": Family("model.language_model.decoder", vision="model.vision_tower", norm=None),
}
"""Vision-language models by `config.model_type`."""


def register_backbone(model_type: str, family: Family) -> None:
    """Teach the library another family; see `docs/models.md`. Replaces an earlier entry."""
    FAMILIES[model_type] = family


def family_of(config: Any) -> Family:
    model_type = getattr(config, "model_type", type(config).__name__)
    family = FAMILIES.get(model_type)
    if isinstance(family, str):
        text_type = config.get_text_config().model_type
        if text_type not in TEXT_FAMILIES:
            raise UnsupportedBackboneError(
                f"{model_type} around the language model {text_type!r} is not known; known inside "
                f"it are {', '.join(sorted(TEXT_FAMILIES))}.",
                f"Add it: offramp.models.registry.TEXT_FAMILIES[{text_type!r}] = Family(stack=..., "
                "norm=..., head=...); docs/models.md shows how to find the paths.",
            )
        return TEXT_FAMILIES[text_type].inside(family, vision="vision_model")
    if family is None:
        raise UnsupportedBackboneError(
            f"Backbone family {model_type!r} is not known.",
            f"{did_you_mean(model_type, FAMILIES)} To add it: "
            f"offramp.register_backbone({model_type!r}, Family(stack='path.to.the.decoder', "
            "head='lm_head')); docs/models.md shows how to find the paths.",
        )
    return family
