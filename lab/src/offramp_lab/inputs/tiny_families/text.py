"""Sizes and token ids that all tiny models share, and their language models."""

from __future__ import annotations

from typing import Any

VOCABULARY = 96
PAD, BOS, EOS, IMAGE, VISION_START, VISION_END, VIDEO = 0, 1, 2, 3, 4, 5, 6
FIRST_WORD = 8
WIDTH = 32
LAYERS = 6
IDS: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
"""A vision tower."""


def heads() -> dict[str, Any]:
    return {"num_attention_heads": 4, "num_key_value_heads": 2}


def llama(**more: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        **heads(),
        **IDS,
        **more,
    )


def opt_config(**more: Any) -> Any:
    from transformers import OPTConfig

    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "word_embed_proj_dim": WIDTH,
        "ffn_dim": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        **IDS,
        **more,
    }
    return OPTConfig(**settings)


def granite() -> Any:
    """A text model with multipliers of its own for embeddings, scores and residuals."""
    from transformers import GraniteConfig

    return GraniteConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        residual_multiplier=0.7,
        logits_scaling=4.0,
        **heads(),
        **IDS,
    )


def qwen3_experts() -> Any:
    """One whose layers are mixtures of experts."""
    from transformers import Qwen3MoeConfig

    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "num_hidden_layers": LAYERS,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        **heads(),
        **IDS,
    }
    return Qwen3MoeConfig(**settings)


def t5(tied: bool = False) -> Any:
    from transformers import T5Config

    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "d_model": WIDTH,
        "d_kv": 8,
        "d_ff": 64,
        # transformers 5.24 sizes the decoder's cache from the encoder's number of layers
        "num_layers": LAYERS,
        "num_decoder_layers": LAYERS,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 16,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": tied,  # tied, the head reads scaled states
        "decoder_start_token_id": PAD,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
    }
    return T5Config(**settings)


def qwen(third: bool = False) -> Any:
    """The text model of InternVL 2.5 or, the third, of 3.5."""
    from transformers import Qwen2Config, Qwen3Config

    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        **({"head_dim": 16} if third else {}),
        **heads(),
        **IDS,
    }
    return (Qwen3Config if third else Qwen2Config)(**settings)
