"""Families of vision-language models, as data: the one place that knows Hugging Face model classes.

A `Family` says where the decoder stack, its layers, its final norm and the LM head are; everything
else works on any family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Family:
    """The places where a model family keeps its language decoder. Paths are dotted, from the VLM.

    stack: the module whose `forward` loops over the decoder layers.
    layers, norm: attributes of the stack; `norm=None` where the stack ends without one.
    head: the LM head.
    hidden_scale: factor on the normed state before the head, or a function of the text config that
    gives it (T5 ties).
    logit_scale: factor on the head's output (Granite, mup). softcap: bound of a soft cap on logits,
    if the configuration does not call it `final_logit_softcapping`. logit_bias: path of a parameter
    or buffer that is added last (BART). suppressed: ids of tokens whose logits the model puts at
    the lowest number (Chameleon's image tokens).
    vision: the vision tower, which reads the image alone.
    causal_prompt: False where prompt tokens also look ahead (PaliGemma, Gemma 3) or where visual
    features join between layers (Qwen3-VL); the prompt then always runs at full depth.
    discovered: found by watching the model, not registered.
    """

    stack: str
    layers: str = "layers"
    norm: str | None = "norm"
    head: str = "lm_head"
    vision: str | None = None
    hidden_scale: Callable[[Any], float] | float | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    logit_bias: str | None = None
    suppressed: tuple[int, ...] = ()
    causal_prompt: bool = True
    discovered: bool = False

    def inside(self, prefix: str, vision: str | None) -> Family:
        """Return the family of a VLM with this text family at `prefix` and the tower `vision`."""
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

_TESTED = dict(FAMILIES)
_TEXTS = """bart gemma gemma2 gemma3_text granite llama opt qwen2 qwen2_5_vl_text
qwen2_vl_text qwen3 qwen3_moe qwen3_vl_text t5"""
_TESTED_TEXTS = frozenset(_TEXTS.split())
"""The decoders that tests run inside these, by `model_type`: a wrapper such as LLaVA may hold any,
with layers that are called otherwise."""


def register_backbone(model_type: str, family: Family) -> None:
    """Register a family; see `docs/models.md`. It replaces an earlier entry, and is used instead of
    watching the model."""
    FAMILIES[model_type] = family


def is_ours(config: Any) -> bool:
    """Return True if a configuration's family is built in, and was not replaced by a plug-in."""
    kind = getattr(config, "model_type", None)
    return kind in FAMILIES and FAMILIES[kind] == _TESTED.get(kind)


def is_tested(config: Any) -> bool:
    """Return True if tests here cover a configuration's family, and the decoder inside."""
    return is_ours(config) and config.get_text_config(decoder=True).model_type in _TESTED_TEXTS


def registered_family(config: Any) -> Family | None:
    """The family of a model's configuration; None where none is registered."""
    family = FAMILIES.get(getattr(config, "model_type", type(config).__name__))
    if isinstance(family, str):
        inside = TEXT_FAMILIES.get(config.get_text_config().model_type)
        return None if inside is None else inside.inside(family, vision="vision_model")
    return family
