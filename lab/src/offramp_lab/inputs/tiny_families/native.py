"""Tiny models whose language model is their own: Qwen-VL, Gemma 3, Florence-2."""

from __future__ import annotations

from typing import Any

from offramp_lab.inputs.tiny_families.text import (
    EOS,
    IDS,
    IMAGE,
    LAYERS,
    TOWER,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCABULARY,
    WIDTH,
    heads,
)

_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_VISION_IDS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def qwen2() -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            vision_config={
                "depth": 2,
                "embed_dim": 16,
                "hidden_size": WIDTH,
                "num_heads": 2,
                "mlp_ratio": 2,
                "patch_size": 8,
            },
            text_config={
                "vocab_size": VOCABULARY,
                "hidden_size": WIDTH,
                "intermediate_size": 64,
                "num_hidden_layers": LAYERS,
                "max_position_embeddings": 128,
                "rope_parameters": _ROPE,
                **heads(),
                **IDS,
            },
            **_VISION_IDS,
        )
    )


def qwen25() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            vision_config={
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_heads": 2,
                "patch_size": 8,
                "window_size": 32,
                "out_hidden_size": WIDTH,
                "fullatt_block_indexes": [1],
            },
            text_config={
                "vocab_size": VOCABULARY,
                "hidden_size": WIDTH,
                "intermediate_size": 64,
                "num_hidden_layers": LAYERS,
                "max_position_embeddings": 128,
                "rope_parameters": _ROPE,
                **heads(),
                **IDS,
            },
            **_VISION_IDS,
        )
    )


def qwen3(experts: bool = False) -> Any:
    """Qwen3-VL, or the one that is a mixture of experts."""
    from transformers import (
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLMoeConfig,
        Qwen3VLMoeForConditionalGeneration,
    )

    settings: dict[str, Any] = {
        "vision_config": {
            "depth": 3,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 8,
            "out_hidden_size": WIDTH,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        "text_config": {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": 64,
            "num_hidden_layers": LAYERS,
            "head_dim": 8,
            "max_position_embeddings": 128,
            "rope_parameters": {**_ROPE, "mrope_interleaved": True},
            **heads(),
            **IDS,
        },
        **_VISION_IDS,
    }
    if not experts:
        return Qwen3VLForConditionalGeneration(Qwen3VLConfig(**settings))
    settings["text_config"] |= {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    }
    return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**settings))


def gemma3() -> Any:
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )

    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            vision_config=SiglipVisionConfig(
                **TOWER, image_size=28, patch_size=7, vision_use_head=False
            ),
            text_config=Gemma3TextConfig(
                vocab_size=VOCABULARY,
                hidden_size=WIDTH,
                intermediate_size=64,
                num_hidden_layers=8,  # more than the pattern of three
                head_dim=8,
                query_pre_attn_scalar=8,
                max_position_embeddings=128,
                sliding_window=6,  # shorter than prompt and answer
                layer_types=[
                    "full_attention" if i % 3 == 2 else "sliding_attention" for i in range(8)
                ],
                **heads(),
                **IDS,
            ),
            mm_tokens_per_image=4,
            image_token_index=IMAGE,
            boi_token_index=VISION_START,
            eoi_token_index=VISION_END,
        )
    )


def florence2() -> Any:
    from transformers import (
        BartConfig,
        Florence2Config,
        Florence2ForConditionalGeneration,
    )
    from transformers.models.florence2.configuration_florence2 import Florence2VisionConfig

    return Florence2ForConditionalGeneration(
        Florence2Config(
            vision_config=Florence2VisionConfig(
                depths=[1, 1],
                patch_size=[7, 3],
                patch_stride=[4, 2],
                patch_padding=[3, 1],
                patch_prenorm=[False, True],
                embed_dim=[8, 16],
                num_heads=[2, 2],
                num_groups=[2, 2],
                window_size=2,
                drop_path_rate=0.0,
                projection_dim=WIDTH,
                max_position_embeddings=8,
            ),
            text_config=BartConfig(
                vocab_size=VOCABULARY,
                d_model=WIDTH,
                encoder_layers=2,
                decoder_layers=LAYERS,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                max_position_embeddings=128,
                decoder_start_token_id=EOS,
                forced_eos_token_id=None,
                **IDS,
            ),
            image_token_id=IMAGE,
        )
    )
