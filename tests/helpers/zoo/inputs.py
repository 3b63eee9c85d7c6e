"""What the processors of the types would return: pixels by the names of `forward`, and ids."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tiny_families.models import pad
from tiny_families.text import BOS, IMAGE
from torch import Tensor

Words = Sequence[Sequence[int]]
Make = Callable[[Any, Words], dict[str, Any]]
"""The inputs of a model, from the words of each row's prompt."""


def _sight(model: Any) -> Any:
    for name in ("vision_config", "visual_config", "vit_config", "encoder"):
        config = getattr(model.config, name, None)
        if config is not None:
            return getattr(config, "vision_config", config)
    return model.config


def _patch(model: Any) -> int:
    return _side(getattr(_sight(model), "patch_size", 14))


def _square(model: Any) -> Callable[..., Tensor]:
    size = _side(getattr(_sight(model), "image_size", None) or 28)
    return lambda *lead: torch.randn(*lead, 3, size, size)


def _side(size: int | Sequence[int]) -> int:
    return int(size if isinstance(size, int) else size[0])


def _pixels(rows: int, *shape: int, **each: Sequence[int]) -> dict[str, Tensor]:
    """Pixels of a shape, and what is said of each image by name, of all alike."""
    told = {name: torch.tensor([values] * rows) for name, values in each.items()}
    return {"pixel_values": torch.randn(*shape), **told}


def _patches(model: Any, rows: int) -> dict[str, Tensor]:
    """A grid of 4 by 4 patches an image, flattened."""
    config = _sight(model)
    times = getattr(config, "temporal_patch_size", None) or getattr(config, "patch_temporal", None)
    return _pixels(rows, rows * 16, (times or 1) * 3 * _patch(model) ** 2, image_grid_thw=(1, 4, 4))


def count(model: Any, pixels: dict[str, Tensor], rows: int) -> int:
    """Tokens that each image takes in the prompt."""
    part = model if hasattr(model, "get_image_features") else model.model
    with torch.no_grad():
        features = part.get_image_features(**pixels)
    for name in ("pooler_output", "deepstack_features", "last_hidden_state"):
        if getattr(features, name, None) is not None:
            features = getattr(features, name)
            break
    if isinstance(features, list) and isinstance(features[0], tuple):
        features = features[0][1]
    if isinstance(features, list | tuple):
        return int(sum(f.reshape(-1, f.shape[-1]).shape[0] for f in features)) // rows
    return int(features.reshape(-1, features.shape[-1]).shape[0]) // rows


def image_id(model: Any) -> int:
    for name in ("image_token_id", "image_token_index", "image_patch_id"):
        token_id = getattr(model.config, name, None)
        if token_id is not None:
            return int(token_id)
    return IMAGE


def put(
    model: Any,
    words: Words,
    pixels: dict[str, Tensor],
    taken: int | None = None,
    frame: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
    side: str = "left",
) -> dict[str, Any]:
    """Ids with `taken` image tokens before the words of each row, and the `pixels`."""
    if taken is None:
        taken = count(model, pixels, len(words))
    image = image_id(model)
    text: dict[str, Any] = pad([[*frame[0], *[image] * taken, *frame[1], *w] for w in words], side)
    names = inspect.signature(model.forward).parameters
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in names:
            text[name] = (text["input_ids"] == image).long()
    return {**text, **pixels}


def by_signature(model: Any, words: Words) -> dict[str, Any]:
    """Pixels as the model's `forward` names them."""
    grid = "image_grid_thw" in inspect.signature(model.forward).parameters
    return put(model, words, (_patches if grid else _local)(model, len(words)))


# -- images among the prompt's tokens --------------------------------------------------------------


def _shown(pixels: Callable[[Any, int], dict[str, Tensor]], **how: Any) -> Make:
    """By `put`, with pixels from the model and the number of rows."""
    return lambda model, words: put(model, words, pixels(model, len(words)), **how)


def _framed(what: str) -> Make:
    """Patches between the two tokens that the configuration names the start and end of this."""

    def make(model: Any, words: Words) -> dict[str, Any]:
        names = (f"{what}_start_token_id", f"{what}_end_token_id")
        start, end = ((getattr(model.config, name),) for name in names)
        return put(model, words, _patches(model, len(words)), frame=(start, end))

    return make


def _sized(model: Any, rows: int, *crops: int) -> dict[str, Tensor]:
    """crops: how many each image is seen in, where it is."""
    square = _square(model)(rows, *crops)
    return {"pixel_values": square, "image_sizes": torch.tensor([[square.shape[-1]] * 2] * rows)}


def _crops(model: Any, rows: int) -> dict[str, Tensor]:
    return _sized(model, rows, 2)


def _tiles(model: Any, rows: int) -> dict[str, Tensor]:
    pixels = _square(model)(rows, 1)
    return {"pixel_values": pixels, "pixel_attention_mask": torch.ones_like(pixels[:, :, 0]).bool()}


def _docling(model: Any, rows: int) -> dict[str, Tensor]:
    mask = torch.ones(rows, 1, dtype=torch.bool)
    return {"pixel_values": _square(model)(rows, 1), "pixel_attention_mask": mask}


def _cpm(model: Any, rows: int) -> dict[str, Tensor]:
    """MiniCPM lays the patches of all images in one long strip."""
    patch = _patch(model)
    return _pixels(rows, 1, 3, patch, 16 * patch * rows, target_sizes=(4, 4))


def _siglip2(model: Any, rows: int) -> dict[str, Tensor]:
    told = {"spatial_shapes": (4, 4), "pixel_attention_mask": (1,) * 16}
    return _pixels(rows, rows, 16, 3 * _patch(model) ** 2, **told)


def _video_llama(model: Any, rows: int) -> dict[str, Tensor]:
    return {**_patches(model, rows), "image_merge_sizes": torch.tensor([2] * rows)}


def _paddle(model: Any, rows: int) -> dict[str, Tensor]:
    patch = _patch(model)
    return _pixels(rows, 16 * rows, 3, patch, patch, image_grid_thw=(1, 4, 4))


def _inkling(model: Any, rows: int) -> dict[str, Tensor]:
    config = _sight(model)
    size = config.patch_size
    return _pixels(rows, rows, config.temporal_patch_size, size, size, 3)


def _inkling2(model: Any, rows: int) -> dict[str, Tensor]:
    side = model.config.vision_config.spatial_merge_size * _patch(model)
    return _pixels(rows, 4 * rows, side, side, 3, image_grid_thw=(1, 2, 2))


def _molmo(model: Any, rows: int) -> dict[str, Tensor]:
    places = model.config.vision_config.num_position_embeddings
    pooling = (torch.arange(4) + places * torch.arange(rows)[:, None]).reshape(-1, 1)
    pixels = _pixels(rows, rows, places, 3 * _patch(model) ** 2, image_grids=(2, 2, 0, 0))
    crops = torch.tensor([1] * rows)
    return {**pixels, "image_token_pooling": pooling, "image_num_crops": crops}


def _gemma4(model: Any, rows: int) -> dict[str, Tensor]:
    config = _sight(model)
    patch = getattr(config, "model_patch_size", config.patch_size)
    places = torch.tensor([[x, y] for y in range(4) for x in range(4)])
    pixels = torch.rand(rows, 16, 3 * patch * patch)
    return {"pixel_values": pixels, "image_position_ids": places.expand(rows, -1, -1)}


def _local(model: Any, rows: int) -> dict[str, Tensor]:
    return {"pixel_values": _square(model)(rows)}


def _hybrid(model: Any, rows: int) -> dict[str, Tensor]:
    coarse, fine = _square(model)(rows), model.config.high_res_vision_config.image_size
    return {"pixel_values": coarse, "high_res_pixel_values": torch.randn(rows, 3, fine, fine)}


# -- images elsewhere, or at places of their own ---------------------------------------------------


def _text_alone(model: Any, words: Words) -> dict[str, Any]:
    """Mistral 4 comes under a name of the auto class and takes no image."""
    return pad(words)


def _blank(model: Any, words: Words) -> dict[str, Any]:
    """The image outside the prompt: captions continue the words."""
    return {**pad(words), "pixel_values": _square(model)(len(words))}


def _pixels_alone(model: Any, words: Words) -> dict[str, Any]:
    encoder = getattr(model.config, "encoder", None) or _sight(model)
    size = _side(encoder.image_size)
    return {"pixel_values": torch.randn(len(words), 3, size, size)}


def _placed(rows: int, width: int) -> Tensor:
    """Nine patches of an image, each behind its row and column."""
    patches = torch.randn(rows, 9, 2 + width)
    patches[:, :, :2] = torch.tensor([[1 + i // 3, 1 + i % 3] for i in range(9)])
    return patches


def _flattened(model: Any, words: Words) -> dict[str, Any]:
    patches = _placed(len(words), model.config.vision_config.patch_embed_hidden_size)
    return {"flattened_patches": patches, "attention_mask": torch.ones(len(words), 9).long()}


def _kosmos(model: Any, words: Words) -> tuple[dict[str, Tensor], Tensor]:
    """The prompt, and where its image is."""
    taken = [IMAGE] * model.config.latent_query_num
    text = pad([[BOS, *taken, *w] for w in words])
    return text, text["input_ids"] == IMAGE


def _kosmos25(model: Any, words: Words) -> dict[str, Any]:
    width = model.vision_model.embeddings.patch_projection.in_features
    patches, (text, place) = _placed(len(words), width), _kosmos(model, words)
    return {**text, "flattened_patches": patches, "image_embeds_position_mask": place.long()}


def _kosmos2(model: Any, words: Words) -> dict[str, Any]:
    text, place = _kosmos(model, words)
    return {**text, "pixel_values": _square(model)(len(words)), "image_embeds_position_mask": place}


def _mllama(model: Any, words: Words) -> dict[str, Any]:
    rows = len(words)
    config = _sight(model)
    tiles = config.max_num_tiles
    text = pad([[IMAGE, *w] for w in words])
    mask = torch.zeros(rows, text["input_ids"].shape[1], 1, tiles).long()
    mask[..., 0] = 1
    tile_mask = torch.zeros(rows, 1, tiles).long()
    tile_mask[..., 0] = 1
    return {
        **text,
        "pixel_values": _square(model)(rows, 1, tiles),
        "aspect_ratio_ids": torch.ones(rows, 1).long(),
        "aspect_ratio_mask": tile_mask,
        "cross_attention_mask": mask,
    }


def _idefics(model: Any, words: Words) -> dict[str, Any]:
    text = pad(words)
    mask = torch.ones(*text["input_ids"].shape, 1).long()
    return {**text, "pixel_values": _square(model)(len(words), 1), "image_attention_mask": mask}


def _udop(model: Any, words: Words) -> dict[str, Any]:
    text = pad(words, "right")
    boxes = torch.rand(*text["input_ids"].shape, 4)
    boxes = torch.cat([boxes[..., :2] * 0.5, 0.5 + boxes[..., 2:] * 0.5], -1)
    return {**text, "bbox": boxes, "pixel_values": _square(model)(len(words))}


def _seq2seq(model: Any, words: Words) -> dict[str, Any]:
    encoder = model.model.encoder
    pixels = {"pixel_values": _square(model)(len(words))}
    with torch.no_grad():
        features = encoder.get_image_features(**pixels)
    features = getattr(features, "pooler_output", features)
    taken = features.reshape(-1, features.shape[-1]).shape[0] // len(words)
    return put(model, words, pixels, taken, side="right")


def _video_blip(model: Any, words: Words) -> dict[str, Any]:
    rows = len(words)
    taken = model.config.num_query_tokens * 4
    text = pad([[model.config.video_token_index] * taken + list(w) for w in words])
    return {
        **text,
        "pixel_values": _square(model)(rows, 4),
        "qformer_input_ids": torch.full((rows, 3), 50),
        "qformer_attention_mask": torch.ones(rows, 3).long(),
    }


def _like(make: Make, *names: str) -> dict[str, Make]:
    return dict.fromkeys(names, make)


IMAGES: dict[str, Make] = {
    **_like(_shown(_sized), "apertus1p5", "emu3", "lighton_ocr", "mistral3", "mistral_large4"),
    **_like(_shown(_crops), "granite4_vision", "llava_next_video", "llava_onevision"),
    **_like(_shown(_cpm), "minicpm_ocr", "minicpmv4_6", "minicpmv4_7"),
    **_like(_shown(_gemma4), "gemma4", "gemma4_unified"),
    **_like(_shown(_inkling2), "inkling2", "inkling2_loop"),
    **_like(_shown(_local), "step3p7", "unlimited_ocr"),
    **_like(_shown(_paddle), "kimi_k25", "paddleocr_vl"),
    **_like(_framed("image"), "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga"),
    **_like(_framed("vision"), "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"),
    **_like(_blank, "blip", "git"),
    **_like(_pixels_alone, "pp_formulanet", "vision-encoder-decoder"),
    **_like(_text_alone, "diffusion_gemma", "mistral4"),
    "deepseek_vl_hybrid": _shown(_hybrid),
    "fuyu": _shown(lambda model, n: _pixels(n, n, 4, 3 * model.config.patch_size**2), taken=4),
    "gemma3n": _shown(lambda _, n: _pixels(n, n, 3, 64, 64), taken=4),
    "granite_docling": _shown(_docling),
    "idefics": _idefics,
    "idefics2": _shown(_tiles),
    "inkling_mm_model": _shown(_inkling),
    "instructblipvideo": _video_blip,
    "kosmos-2": _kosmos2,
    "kosmos-2.5": _kosmos25,
    "lfm2_vl": _shown(_siglip2),
    "mllama": _mllama,
    "molmo2": _shown(_molmo, taken=4),
    "nemotron_h_omni": _shown(
        lambda model, n: _pixels(n, 16 * n, 3 * _patch(model) ** 2, image_grid_hw=(4, 4))
    ),
    "perception_lm": _shown(lambda _, n: _pixels(n, n, 1, 3, 28, 28)),
    "pix2struct": _flattened,
    "t5gemma2": _seq2seq,
    "udop": _udop,
    "video_llama_3": _shown(_video_llama),
}
