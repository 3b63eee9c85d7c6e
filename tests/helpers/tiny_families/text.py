"""Sizes and token ids that all tiny models share, and their language models."""

from __future__ import annotations

from typing import Any

VOCABULARY = 96
PAD, BOS, EOS, IMAGE, VISION_START, VISION_END, VIDEO = 0, 1, 2, 3, 4, 5, 6
FIRST_WORD = 8
WIDTH = 32
LAYERS = 6
IDS: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    **IDS,
}
"""A decoder as most are today."""
APART: dict[str, Any] = {**SIZES, "tie_word_embeddings": False}
"""The same with a head of its own."""


def config(name: str, **settings: Any) -> Any:
    """A configuration of transformers, by its class's name without the ending."""
    import transformers

    return getattr(transformers, f"{name}Config")(**settings)


def llama(**more: Any) -> Any:
    return config("Llama", **{**APART, **more})


def opt_config(**more: Any) -> Any:
    own = {"word_embed_proj_dim": WIDTH, "ffn_dim": 64}
    kept = {n: v for n, v in SIZES.items() if n not in ("intermediate_size", "num_key_value_heads")}
    return config("OPT", **{**kept, **own, **more})


def granite() -> Any:
    """A text model with multipliers of its own for embeddings, scores and residuals."""
    return config(
        "Granite",
        **APART,
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        residual_multiplier=0.7,
        logits_scaling=4.0,
    )


def qwen3_experts() -> Any:
    """One whose layers are mixtures of experts."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
    return config("Qwen3Moe", **APART, **experts, moe_intermediate_size=32, head_dim=16)


def t5(tied: bool = False, **more: Any) -> Any:
    own = {
        "vocab_size": VOCABULARY,
        "d_model": WIDTH,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": LAYERS,  # transformers 5.24 sizes the decoder's cache by the encoder's layers
        "num_decoder_layers": LAYERS,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 16,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": tied,  # then, the head reads scaled states
        "decoder_start_token_id": PAD,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
    }
    return config("T5", **{**own, **more})


def qwen(third: bool = False) -> Any:
    """The text model of InternVL 2.5 or, the third, of 3.5."""
    return config("Qwen3", **APART, head_dim=16) if third else config("Qwen2", **APART)
