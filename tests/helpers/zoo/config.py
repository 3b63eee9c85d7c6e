"""Any configuration of transformers, made tiny by rules on the names of its fields."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tiny_families.text import BOS, EOS, IMAGE, LAYERS, PAD, VOCABULARY, WIDTH

FIRST_WORD = 40
"""Ids below are special: pads, ends and whatever marks images, video or sound."""

_SEES = re.compile(
    r"vision|visual|vit|image|audio|qformer|vq|perceiver|sam|backbone|sound|speech|high_res|"
    r"tower|projector|protein|mtp"
)


def _sizes(*named: tuple[Any, str]) -> dict[str, Any]:
    """Sizes by the names of the fields that have them."""
    return {name: size for size, names in named for name in names.split()}


_TEXT = _sizes(
    (LAYERS, "num_hidden_layers num_layers num_decoder_layers decoder_layers encoder_layers"),
    (WIDTH, "hidden_size d_model"),
    (64, "intermediate_size"),
)
_SIGHT = _sizes(
    (2, "num_hidden_layers num_layers encoder_layers decoder_layers n_layers depth layers"),
    (2, "num_attention_heads num_heads num_key_value_heads encoder_attention_heads"),
    (2, "attention_heads"),
    (16, "hidden_size d_model embed_dim"),
    (32, "intermediate_size mlp_dim"),
    (WIDTH, "out_hidden_size"),
)
_BOTH = _sizes(
    (4, "num_attention_heads num_heads encoder_attention_heads decoder_attention_heads"),
    (4, "attention_heads heads num_experts n_routed_experts num_local_experts moe_num_experts"),
    (4, "qk_rope_head_dim linear_num_value_heads num_query_tokens"),
    (2, "num_key_value_heads num_experts_per_tok top_k_experts moe_topk moe_k"),
    (2, "linear_num_key_heads index_n_heads"),
    (8, "head_dim d_kv qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim"),
    (8, "index_head_dim sliding_window query_pre_attn_scalar relative_attention_num_buckets"),
    (8, "hidden_size_per_layer_input"),
    (12, "qk_head_dim"),
    (64, "d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim"),
    (WIDTH, "word_embed_proj_dim projection_dim text_hidden_size image_text_hidden_size"),
    (32, "projector_hidden_size"),
    (256, "max_position_embeddings original_max_position_embeddings"),
    (1, "n_group topk_group n_shared_experts"),
    (16, "moe_intermediate_size shared_expert_intermediate_size"),
    (16, "moe_shared_expert_intermediate_size shared_experts_intermediate_size"),
    (16, "q_lora_rank kv_lora_rank index_topk encoder_hidden_size"),
    (16, "relative_attention_max_distance num_position_embeddings"),
    (28, "image_size"),
    (14, "patch_size"),
    (VOCABULARY, "vocab_size_per_layer_input"),
    (0.0, "router_jitter_noise layerdrop decoder_layerdrop encoder_layerdrop"),
)
_TOKEN = re.compile(r"(_token_id|_token_index|_id|_index)$")
_NO_FIELDS = re.compile(r"rope|rotary|vocabulary|2label|_dict$")
_NO_TOKEN = re.compile(r"_layer|loop|moe|active|label")


def shrink(
    config: Mapping[str, Any], path: str = "", ids: dict[str, int] | None = None
) -> dict[str, Any]:
    """The configuration's dict with every size small; special tokens get the first ids.

    path: where it stands in a larger one. ids: what tokens of that got, by role.
    """
    ids = {} if ids is None else ids
    sees = bool(_SEES.search(path))
    sizes = {**_BOTH, **(_SIGHT if sees else _TEXT)}
    tiny: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and not _NO_FIELDS.search(name):
            tiny[name] = shrink(value, f"{path}.{name}", ids)
        elif name in sizes and isinstance(value, int | float) and value:
            tiny[name] = sizes[name]
        elif name in sizes and isinstance(value, list | tuple) and value:
            tiny[name] = [sizes[name]] * len(value)
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
