"""Any configuration of transformers, made tiny by rules on the names of its fields."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from offramp_lab.inputs.tiny_families.text import BOS, EOS, IMAGE, LAYERS, PAD, VOCABULARY, WIDTH

FIRST_WORD = 40
"""Ids below are special: pads, ends and whatever marks images, video or sound."""

_SEES = re.compile(
    r"vision|visual|vit|image|audio|qformer|vq|perceiver|sam|backbone|sound|speech|high_res|"
    r"tower|projector|protein|mtp"
)

_TEXT: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "num_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_layers": LAYERS,
    "hidden_size": WIDTH,
    "d_model": WIDTH,
    "intermediate_size": 64,
}
_SIGHT: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "n_layers": 2,
    "depth": 2,
    "layers": 2,
    "hidden_size": 16,
    "d_model": 16,
    "embed_dim": 16,
    "intermediate_size": 32,
    "out_hidden_size": WIDTH,
    "mlp_dim": 32,
    "num_attention_heads": 2,
    "num_heads": 2,
    "num_key_value_heads": 2,
    "encoder_attention_heads": 2,
    "attention_heads": 2,
}
_BOTH: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "attention_heads": 4,
    "heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "d_ff": 64,
    "ffn_dim": 64,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "word_embed_proj_dim": WIDTH,
    "projection_dim": WIDTH,
    "text_hidden_size": WIDTH,
    "image_text_hidden_size": WIDTH,
    "projector_hidden_size": 32,
    "max_position_embeddings": 256,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "qk_head_dim": 12,
    "v_head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 16,
    "sliding_window": 8,
    "original_max_position_embeddings": 256,
    "image_size": 28,
    "patch_size": 14,
    "num_query_tokens": 4,
    "encoder_hidden_size": 16,
    "query_pre_attn_scalar": 8,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "num_position_embeddings": 16,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "router_jitter_noise": 0.0,
    "layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "encoder_layerdrop": 0.0,
}
_TOKEN = re.compile(r"(_token_id|_token_index|_id|_index)$")
_NO_FIELDS = re.compile(r"rope|rotary|vocabulary|2label|_dict$")
_NO_TOKEN = re.compile(r"_layer|loop|moe|active|label")


def shrink(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The configuration's dict with every size small; special tokens get the first ids."""
    return _shrink(config, path, {})


def _shrink(config: Mapping[str, Any], path: str, ids: dict[str, int]) -> dict[str, Any]:
    sees = bool(_SEES.search(path))
    sizes = {**_BOTH, **(_SIGHT if sees else _TEXT)}
    tiny: dict[str, Any] = {}
    for name, value in config.items():
        inside = f"{path}.{name}"
        if isinstance(value, Mapping) and not _NO_FIELDS.search(name):
            tiny[name] = _shrink(value, inside, ids)
        elif name in sizes and isinstance(value, int | float | list | tuple) and value:
            tiny[name] = (
                sizes[name] if isinstance(value, int | float) else [sizes[name]] * len(value)
            )
        elif name == "vocab_size":
            tiny[name] = VOCABULARY
        elif _TOKEN.search(name) and not _NO_TOKEN.search(name):
            tiny[name] = _token(name, value, ids)
        else:
            tiny[name] = value
    _fit_layers(tiny, config)
    return tiny


def _token(name: str, value: Any, ids: dict[str, int]) -> Any:
    """Small and one for each role: two names of one role have one id."""
    fixed = {"pad": PAD, "bos": BOS, "eos": EOS, "decoder_start": BOS, "image": IMAGE}
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    role = re.sub(r"_(token_)?(id|index)$", "", name)
    if role in fixed:
        return fixed[role]
    if role not in ids:
        ids[role] = 4 + len(ids)
    return ids[role]


def _fit_layers(tiny: dict[str, Any], config: Mapping[str, Any]) -> None:
    """Lists with an item for each layer get as many as there are now, every kind among them."""
    long = config.get("num_hidden_layers")
    layers = tiny.get("num_hidden_layers")
    if not isinstance(long, int) or not isinstance(layers, int):
        return
    for name, value in config.items():
        if isinstance(value, list) and len(value) == long and long > layers:
            tiny[name] = compress(value, layers)


def compress(kinds: list[Any], layers: int) -> list[Any]:
    """`layers` items in the order of `kinds`: a short period and every kind."""
    step = len(kinds) / layers
    even = [kinds[int(i * step)] for i in range(layers)]
    if kinds == list(range(len(kinds))):
        return list(range(layers))
    if set(map(str, even)) == set(map(str, kinds)):
        return even
    head = kinds[:layers]
    missing = [k for k in dict.fromkeys(map(str, kinds)) if k not in set(map(str, head))]
    by_text = {str(k): k for k in kinds}
    for offset, kind in enumerate(missing[:layers]):
        head[layers - 1 - offset] = by_text[kind]
    return head
