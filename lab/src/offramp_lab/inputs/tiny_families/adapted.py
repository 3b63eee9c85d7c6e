"""Tiny models that put an adapter between a vision tower and a whole language model."""

from __future__ import annotations

from typing import Any

from offramp_lab.inputs.tiny_families.text import (
    IDS,
    IMAGE,
    LAYERS,
    PAD,
    TOWER,
    VOCABULARY,
    WIDTH,
    heads,
    llama,
)

_PAD: dict[str, Any] = {"pad_token_id": PAD}


def blip2(text: Any) -> Any:
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2QFormerConfig,
        Blip2VisionConfig,
    )

    return Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config=Blip2VisionConfig(**TOWER, image_size=28, patch_size=14),
            qformer_config=Blip2QFormerConfig(**TOWER, vocab_size=8, encoder_hidden_size=16),
            text_config=text,
            num_query_tokens=4,
            image_token_index=IMAGE,
        )
    )


def instructblip(text: Any) -> Any:
    from transformers import (
        InstructBlipConfig,
        InstructBlipForConditionalGeneration,
        InstructBlipQFormerConfig,
        InstructBlipVisionConfig,
    )

    return InstructBlipForConditionalGeneration(
        InstructBlipConfig(
            vision_config=InstructBlipVisionConfig(**TOWER, image_size=28, patch_size=14),
            qformer_config=InstructBlipQFormerConfig(
                **TOWER, vocab_size=VOCABULARY, encoder_hidden_size=16, max_position_embeddings=64
            ),
            text_config=text,
            num_query_tokens=4,
            image_token_index=IMAGE,
        )
    )


def llava() -> Any:
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**TOWER, image_size=28, patch_size=14),
            text_config=llama(),
            image_token_index=IMAGE,
            image_seq_length=4,
        )
    )


def llava_next(text: Any = None) -> Any:
    from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    return LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=CLIPVisionConfig(**TOWER, image_size=28, patch_size=14),
            text_config=text or llama(),
            image_token_index=IMAGE,
            image_grid_pinpoints=[[28, 28]],
        )
    )


def idefics3() -> Any:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig

    return Idefics3ForConditionalGeneration(
        Idefics3Config(
            vision_config=Idefics3VisionConfig(**TOWER, image_size=32, patch_size=8),
            text_config=llama(),
            image_token_id=IMAGE,
            scale_factor=2,
            **_PAD,
        )
    )


def smolvlm() -> Any:
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration
    from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

    return SmolVLMForConditionalGeneration(
        SmolVLMConfig(
            vision_config=SmolVLMVisionConfig(**TOWER, image_size=32, patch_size=8),
            text_config=llama(),
            image_token_id=IMAGE,
            scale_factor=2,
            **_PAD,
        )
    )


def paligemma(text: dict[str, Any]) -> Any:
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

    return PaliGemmaForConditionalGeneration(
        PaliGemmaConfig(
            vision_config=SiglipVisionConfig(
                **TOWER, image_size=28, patch_size=14, vision_use_head=False
            ),
            text_config={
                "vocab_size": VOCABULARY,
                "hidden_size": WIDTH,
                "intermediate_size": 64,
                "num_hidden_layers": LAYERS,
                "head_dim": 8,
                "max_position_embeddings": 128,
                **heads(),
                **IDS,
                **text,
            },
            image_token_index=IMAGE,
            projection_dim=WIDTH,
            hidden_size=WIDTH,
            **IDS,
        )
    )


def internvl(text: Any) -> Any:
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig

    return InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=InternVLVisionConfig(**TOWER, image_size=[32, 32], patch_size=[8, 8]),
            text_config=text,
            image_token_id=IMAGE,
            image_seq_length=4,
            tie_word_embeddings=False,
        )
    )
