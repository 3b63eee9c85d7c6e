"""The tiny models around their language models, and what the processor of each returns besides ids
and mask, from both [B, T]."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from tiny_families.text import (
    EOS,
    IDS,
    IMAGE,
    LAYERS,
    PAD,
    SIZES,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCABULARY,
    WIDTH,
    config,
    llama,
)

TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
"""A vision tower."""
_SQUARE: dict[str, Any] = {**TOWER, "image_size": 28, "patch_size": 14}
_FINE: dict[str, Any] = {**TOWER, "image_size": 32, "patch_size": 8}
_AT: dict[str, Any] = {"image_token_index": IMAGE}
_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_VISION_IDS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def _model(name: str, **settings: Any) -> Any:
    """A model of transformers, by its class's name without the ending."""
    import transformers

    return getattr(transformers, f"{name}ForConditionalGeneration")(config(name, **settings))


# -- an adapter between a vision tower and a whole language model ----------------------------------


def blip2(text: Any, layers: int = 2) -> Any:
    """layers: of the vision tower and of the Q-Former."""
    tower = {**TOWER, "num_hidden_layers": layers}
    return _model(
        "Blip2",
        vision_config=config("Blip2Vision", **{**_SQUARE, **tower}),
        qformer_config=config("Blip2QFormer", **tower, vocab_size=8, encoder_hidden_size=16),
        text_config=text,
        num_query_tokens=4,
        **_AT,
    )


def instructblip(text: Any) -> Any:
    asks = {"vocab_size": VOCABULARY, "encoder_hidden_size": 16, "max_position_embeddings": 64}
    return _model(
        "InstructBlip",
        vision_config=config("InstructBlipVision", **_SQUARE),
        qformer_config=config("InstructBlipQFormer", **TOWER, **asks),
        text_config=text,
        num_query_tokens=4,
        **_AT,
    )


def llava(text: Any = None, layers: int = 2, side: int = 28) -> Any:
    """layers: of the vision tower. side: of an image, in pixels."""
    text = text or llama()
    tower = {**_SQUARE, "num_hidden_layers": layers, "image_size": side}
    return _model(
        "Llava",
        vision_config=config("CLIPVision", **tower),
        text_config=text,
        image_seq_length=(side // 14) ** 2,
        tie_word_embeddings=text.tie_word_embeddings,
        **_AT,
    )


def llava_next(text: Any = None) -> Any:
    return _model(
        "LlavaNext",
        vision_config=config("CLIPVision", **_SQUARE),
        text_config=text or llama(),
        image_grid_pinpoints=[[28, 28]],
        **_AT,
    )


def tiled(name: str) -> Any:
    """Idefics3 and SmolVLM."""
    return _model(
        name,
        vision_config=_FINE,
        text_config=llama(),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
    )


def paligemma(**text: Any) -> Any:
    return _model(
        "PaliGemma",
        vision_config=config("SiglipVision", **_SQUARE, vision_use_head=False),
        text_config={**SIZES, "head_dim": 8, **text},
        projection_dim=WIDTH,
        hidden_size=WIDTH,
        **_AT,
        **IDS,
    )


def internvl(text: Any) -> Any:
    sides = {"image_size": [32, 32], "patch_size": [8, 8]}
    return _model(
        "InternVL",
        vision_config=config("InternVLVision", **TOWER, **sides),
        text_config=text,
        image_token_id=IMAGE,
        image_seq_length=4,
        tie_word_embeddings=False,
    )


# -- a language model of their own -----------------------------------------------------------------


def qwen2() -> Any:
    tower = {"depth": 2, "embed_dim": 16, "hidden_size": WIDTH, "mlp_ratio": 2}
    return _model(
        "Qwen2VL",
        vision_config={**tower, "num_heads": 2, "patch_size": 8},
        text_config={**SIZES, "rope_parameters": _ROPE},
        **_VISION_IDS,
    )


_PATCHED: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 8,
    "out_hidden_size": WIDTH,
}


def qwen25(text: Mapping[str, Any] | None = None, layers: int = 2) -> Any:
    """text: what its text model differs in. layers: of the vision tower."""
    text = {**SIZES, "rope_parameters": _ROPE, **(text or {})}
    windows = {"depth": layers, "window_size": 32, "fullatt_block_indexes": [layers - 1]}
    return _model(
        "Qwen2_5_VL",
        vision_config={**_PATCHED, **windows, "out_hidden_size": text["hidden_size"]},
        text_config=text,
        **_VISION_IDS,
    )


def qwen3(experts: bool = False) -> Any:
    """Qwen3-VL, or the one that is a mixture of experts."""
    stacked = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1, 2]}
    text = {**SIZES, "head_dim": 8, "rope_parameters": {**_ROPE, "mrope_interleaved": True}}
    if experts:
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return _model(
        "Qwen3VLMoe" if experts else "Qwen3VL",
        vision_config={**_PATCHED, "depth": 3, **stacked},
        text_config=text,
        **_VISION_IDS,
    )


def gemma3() -> Any:
    own: dict[str, Any] = {
        "num_hidden_layers": 8,  # more than the pattern of three
        "sliding_window": 6,  # shorter than prompt and answer
        "layer_types": [f"{'full' if i % 3 == 2 else 'sliding'}_attention" for i in range(8)],
        "query_pre_attn_scalar": 8,
        "head_dim": 8,
    }
    tower = {**_SQUARE, "patch_size": 7, "vision_use_head": False}
    return _model(
        "Gemma3",
        vision_config=config("SiglipVision", **tower),
        text_config=config("Gemma3Text", **{**SIZES, **own}),
        mm_tokens_per_image=4,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
        **_AT,
    )


def florence2() -> Any:
    bart = {
        f"{part}_{name}": n
        for part in ("encoder", "decoder")
        for name, n in (("attention_heads", 4), ("ffn_dim", 64))
    }
    return _model(
        "Florence2",
        vision_config={
            "depths": [1, 1],
            "patch_size": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "embed_dim": [8, 16],
            "num_heads": [2, 2],
            "num_groups": [2, 2],
            "window_size": 2,
            "drop_path_rate": 0.0,
            "projection_dim": WIDTH,
            "max_position_embeddings": 8,
        },
        text_config=config(
            "Bart",
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            encoder_layers=2,
            decoder_layers=LAYERS,
            max_position_embeddings=128,
            decoder_start_token_id=EOS,
            forced_eos_token_id=None,
            **bart,
            **IDS,
        ),
        image_token_id=IMAGE,
    )


# -- what their processors return ------------------------------------------------------------------


def sized(ids: Tensor, mask: Tensor, draw: Generator, side: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(len(ids), 3, side, side, generator=draw)}


def square(side: int) -> Callable[[Tensor, Tensor, Generator], dict[str, Tensor]]:
    return partial(sized, side=side)


def with_question(ids: Tensor, mask: Tensor, draw: Generator) -> dict[str, Tensor]:
    """InstructBLIP's Q-Former reads the question too, through a tokenizer of its own."""
    words = torch.where(ids > IMAGE, ids, PAD)
    asked = {"qformer_input_ids": words, "qformer_attention_mask": (words != PAD).long()}
    return {**square(28)(ids, mask, draw), **asked}


def tiles(ids: Tensor, mask: Tensor, draw: Generator) -> dict[str, Tensor]:
    seen = torch.ones(len(ids), 1, 32, 32, dtype=torch.bool)
    return {
        "pixel_values": torch.randn(len(ids), 1, 3, 32, 32, generator=draw),
        "pixel_attention_mask": seen,
    }


def crops(ids: Tensor, mask: Tensor, draw: Generator) -> dict[str, Tensor]:
    """LLaVA-NeXT sees each image whole and in crops; here one."""
    sizes = torch.tensor([[28, 28]] * len(ids))
    return {
        "pixel_values": torch.randn(len(ids), 2, 3, 28, 28, generator=draw),
        "image_sizes": sizes,
    }


def patches(ids: Tensor, mask: Tensor, draw: Generator, side: int = 4) -> dict[str, Tensor]:
    """Qwen's processor flattens the patches of all images and tells their grids apart. side: of an
    image, in patches; four of them are a token."""
    return {
        "pixel_values": torch.randn(len(ids) * side**2, 3 * 2 * 8 * 8, generator=draw),
        "image_grid_thw": torch.tensor([[1, side, side]] * len(ids)),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def prefix(ids: Tensor, mask: Tensor, draw: Generator) -> dict[str, Tensor]:
    return {**square(28)(ids, mask, draw), "token_type_ids": torch.zeros_like(ids)}


def blocks(ids: Tensor, mask: Tensor, draw: Generator) -> dict[str, Tensor]:
    return {**square(28)(ids, mask, draw), "token_type_ids": (ids == IMAGE).long()}


def pad(rows: Sequence[Sequence[int]], side: str = "left") -> dict[str, Tensor]:
    """Ids and mask [B, T] of rows of different lengths."""
    longest = max(map(len, rows))
    ids, masks = [], []
    for row in map(list, rows):
        padding, off, on = [PAD] * (longest - len(row)), [0] * (longest - len(row)), [1] * len(row)
        ids.append(padding + row if side == "left" else row + padding)
        masks.append(off + on if side == "left" else on + off)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)}
