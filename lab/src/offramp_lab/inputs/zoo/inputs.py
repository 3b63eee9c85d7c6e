"""What the processors of the types would return: pixels by the names of `forward`, and ids."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from offramp_lab.inputs.zoo.config import BOS, IMAGE, PAD

Words = Sequence[Sequence[int]]


def pad(rows: Words, side: str = "left") -> dict[str, Tensor]:
    """Ids and mask [B, T] of rows of different lengths."""
    longest = max(map(len, rows))
    ids, masks = [], []
    for row in map(list, rows):
        gap = longest - len(row)
        padding, off, on = [PAD] * gap, [0] * gap, [1] * len(row)
        ids.append(padding + row if side == "left" else row + padding)
        masks.append(off + on if side == "left" else on + off)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)}


def _sight(model: Any) -> Any:
    for name in ("vision_config", "visual_config", "vit_config", "encoder"):
        config = getattr(model.config, name, None)
        if config is not None:
            return getattr(config, "vision_config", config)
    return model.config


def _patch(model: Any) -> int:
    size = getattr(_sight(model), "patch_size", 14)
    return int(size if isinstance(size, int) else size[0])


def _square(model: Any, size: int | None = None) -> Callable[..., Tensor]:
    if size is None:
        configured = getattr(_sight(model), "image_size", None) or 28
        size = int(configured if isinstance(configured, int) else configured[0])
    return lambda *lead: torch.randn(*lead, 3, size, size)


def _patches(model: Any, rows: int, times: int | None = None) -> dict[str, Tensor]:
    """A grid of 4 by 4 patches an image, flattened."""
    config, patch = _sight(model), _patch(model)
    if times is None:
        times = getattr(config, "temporal_patch_size", None) or getattr(
            config, "patch_temporal", None
        )
    return {
        "pixel_values": torch.randn(rows * 16, (times or 1) * 3 * patch * patch),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * rows),
    }


def _features(model: Any) -> Callable[..., Any]:
    for part in (model, getattr(model, "model", None)):
        if hasattr(part, "get_image_features"):
            return part.get_image_features  # type: ignore[no-any-return, union-attr]
    raise LookupError("no get_image_features")


def count(model: Any, pixels: dict[str, Tensor], rows: int) -> int:
    """Tokens that each image takes in the prompt."""
    with torch.no_grad():
        features = _features(model)(**pixels)
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
    rows = len(words)
    names = inspect.signature(model.forward).parameters
    if "image_grid_thw" in names:
        pixels = _patches(model, rows)
    else:
        pixels = {"pixel_values": _square(model)(rows)}
    return put(model, words, pixels)


def _framed(model: Any, words: Words) -> dict[str, Any]:
    config = model.config
    start, end = config.vision_start_token_id, getattr(config, "vision_end_token_id", BOS)
    return put(model, words, _patches(model, len(words)), frame=((start,), (end,)))


def _glm(model: Any, words: Words) -> dict[str, Any]:
    config = model.config
    frame = ((config.image_start_token_id,), (config.image_end_token_id,))
    return put(model, words, _patches(model, len(words)), frame=frame)


def _tiles(model: Any, words: Words) -> dict[str, Any]:
    pixels = _square(model)(len(words), 1)
    mask = torch.ones(len(words), 1, *pixels.shape[-2:], dtype=torch.bool)
    return put(model, words, {"pixel_values": pixels, "pixel_attention_mask": mask})


def _docling(model: Any, words: Words) -> dict[str, Any]:
    mask = torch.ones(len(words), 1, dtype=torch.bool)
    pixels = {"pixel_values": _square(model)(len(words), 1), "pixel_attention_mask": mask}
    return put(model, words, pixels)


def _crops(model: Any, words: Words) -> dict[str, Any]:
    crops = _square(model)(len(words), 2)
    size = crops.shape[-1]
    pixels = {"pixel_values": crops, "image_sizes": torch.tensor([[size, size]] * len(words))}
    return put(model, words, pixels)


def _sized(model: Any, words: Words) -> dict[str, Any]:
    square = _square(model)(len(words))
    size = square.shape[-1]
    pixels = {"pixel_values": square, "image_sizes": torch.tensor([[size, size]] * len(words))}
    return put(model, words, pixels)


def _cpm(model: Any, words: Words) -> dict[str, Any]:
    """MiniCPM lays the patches of all images in one long strip."""
    patch = _patch(model)
    sizes = torch.tensor([[4, 4]] * len(words))
    pixels = {
        "pixel_values": torch.randn(1, 3, patch, 16 * patch * len(words)),
        "target_sizes": sizes,
    }
    return put(model, words, pixels)


def _nemotron(model: Any, words: Words) -> dict[str, Any]:
    pixels = {
        "pixel_values": torch.randn(16 * len(words), 3 * _patch(model) ** 2),
        "image_grid_hw": torch.tensor([[4, 4]] * len(words)),
    }
    return put(model, words, pixels)


def _siglip2(model: Any, words: Words) -> dict[str, Any]:
    pixels = {
        "pixel_values": torch.randn(len(words), 16, 3 * _patch(model) ** 2),
        "spatial_shapes": torch.tensor([[4, 4]] * len(words)),
        "pixel_attention_mask": torch.ones(len(words), 16, dtype=torch.long),
    }
    return put(model, words, pixels)


def _video_llama(model: Any, words: Words) -> dict[str, Any]:
    pixels = {
        **_patches(model, len(words)),
        "image_merge_sizes": torch.tensor([2] * len(words)),
    }
    return put(model, words, pixels)


def _paddle(model: Any, words: Words) -> dict[str, Any]:
    patch = _patch(model)
    pixels = {
        "pixel_values": torch.randn(16 * len(words), 3, patch, patch),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * len(words)),
    }
    return put(model, words, pixels)


def _inkling(model: Any, words: Words) -> dict[str, Any]:
    config = _sight(model)
    size = config.patch_size
    pixels = torch.randn(len(words), config.temporal_patch_size, size, size, 3)
    return put(model, words, {"pixel_values": pixels})


def _inkling2(model: Any, words: Words) -> dict[str, Any]:
    patch = _patch(model)
    side = model.config.vision_config.spatial_merge_size * patch
    pixels = {
        "pixel_values": torch.randn(4 * len(words), side, side, 3),
        "image_grid_thw": torch.tensor([[1, 2, 2]] * len(words)),
    }
    return put(model, words, pixels)


def _molmo(model: Any, words: Words) -> dict[str, Any]:
    patch, rows = _patch(model), len(words)
    places = model.config.vision_config.num_position_embeddings
    pooling = (torch.arange(4) + places * torch.arange(rows)[:, None]).reshape(-1, 1)
    pixels = {
        "pixel_values": torch.randn(rows, places, 3 * patch * patch),
        "image_token_pooling": pooling,
        "image_grids": torch.tensor([[2, 2, 0, 0]] * rows),
    }
    text = put(model, words, pixels, taken=4)
    return {**text, "image_num_crops": torch.tensor([1] * rows)}


def _gemma4(model: Any, words: Words) -> dict[str, Any]:
    config = _sight(model)
    patch, rows = getattr(config, "model_patch_size", config.patch_size), len(words)
    places = torch.tensor([[x, y] for y in range(4) for x in range(4)])
    pixels = {
        "pixel_values": torch.rand(rows, 16, 3 * patch * patch),
        "image_position_ids": places.expand(rows, -1, -1),
    }
    return put(model, words, pixels)


def _local(model: Any, words: Words) -> dict[str, Any]:
    return put(model, words, {"pixel_values": _square(model)(len(words))})


def _perception(model: Any, words: Words) -> dict[str, Any]:
    return put(model, words, {"pixel_values": torch.randn(len(words), 1, 3, 28, 28)})


def _fuyu(model: Any, words: Words) -> dict[str, Any]:
    patch = model.config.patch_size
    pixels = {"pixel_values": torch.randn(len(words), 4, 3 * patch * patch)}
    return put(model, words, pixels, taken=4)


def _text_alone(model: Any, words: Words) -> dict[str, Any]:
    """Mistral 4 comes under a name of the auto class and takes no image."""
    return pad(words)


def _gemma3n(model: Any, words: Words) -> dict[str, Any]:
    return put(model, words, {"pixel_values": torch.randn(len(words), 3, 64, 64)}, taken=4)


def _hybrid(model: Any, words: Words) -> dict[str, Any]:
    fine = model.config.high_res_vision_config.image_size
    pixels = {
        "pixel_values": _square(model)(len(words)),
        "high_res_pixel_values": torch.randn(len(words), 3, fine, fine),
    }
    return put(model, words, pixels)


def _blank(model: Any, words: Words) -> dict[str, Any]:
    """The image outside the prompt: captions continue the words."""
    return {**pad(words), "pixel_values": _square(model)(len(words))}


def _pixels_alone(model: Any, words: Words) -> dict[str, Any]:
    encoder = getattr(model.config, "encoder", None) or _sight(model)
    size = encoder.image_size
    size = size if isinstance(size, int) else size[0]
    return {"pixel_values": torch.randn(len(words), 3, size, size)}


def _flattened(model: Any, words: Words) -> dict[str, Any]:
    patches = torch.randn(len(words), 9, 2 + model.config.vision_config.patch_embed_hidden_size)
    places = torch.tensor([[1 + i // 3, 1 + i % 3] for i in range(9)])
    patches[:, :, :2] = places
    return {"flattened_patches": patches, "attention_mask": torch.ones(len(words), 9).long()}


def _kosmos25(model: Any, words: Words) -> dict[str, Any]:
    patches = torch.randn(
        len(words), 9, 2 + model.vision_model.embeddings.patch_projection.in_features
    )
    patches[:, :, :2] = torch.tensor([[1 + i // 3, 1 + i % 3] for i in range(9)])
    taken = model.config.latent_query_num
    text = pad([[BOS, *[IMAGE] * taken, *w] for w in words])
    place = (text["input_ids"] == IMAGE).long()
    return {**text, "flattened_patches": patches, "image_embeds_position_mask": place}


def _kosmos2(model: Any, words: Words) -> dict[str, Any]:
    taken = model.config.latent_query_num
    text = pad([[BOS, *[IMAGE] * taken, *w] for w in words])
    place = text["input_ids"] == IMAGE
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


def _omni(model: Any, words: Words) -> dict[str, Any]:
    pixels = {**_patches(model, len(words))}
    start, end = model.config.vision_start_token_id, model.config.vision_end_token_id
    return put(model, words, pixels, frame=((start,), (end,)))


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


IMAGES: dict[str, Callable[[Any, Words], dict[str, Any]]] = {
    "apertus1p5": _sized,
    "blip": _blank,
    "deepseek_vl_hybrid": _hybrid,
    "diffusion_gemma": _text_alone,
    "emu3": _sized,
    "fuyu": _fuyu,
    "gemma4": _gemma4,
    "gemma4_unified": _gemma4,
    "gemma3n": _gemma3n,
    "git": _blank,
    "granite4_vision": _crops,
    "granite_docling": _docling,
    "glm46v": _glm,
    "glm4v": _glm,
    "glm4v_moe": _glm,
    "glm_ocr": _glm,
    "glmga": _glm,
    "idefics": _idefics,
    "idefics2": _tiles,
    "inkling2": _inkling2,
    "inkling2_loop": _inkling2,
    "inkling_mm_model": _inkling,
    "instructblipvideo": _video_blip,
    "kosmos-2": _kosmos2,
    "kosmos-2.5": _kosmos25,
    "lfm2_vl": _siglip2,
    "lighton_ocr": _sized,
    "llava_next_video": _crops,
    "llava_onevision": _crops,
    "minicpm_ocr": _cpm,
    "minicpmv4_6": _cpm,
    "minicpmv4_7": _cpm,
    "mistral3": _sized,
    "mistral_large4": _sized,
    "mistral4": _text_alone,
    "mllama": _mllama,
    "molmo2": _molmo,
    "nemotron_h_omni": _nemotron,
    "paddleocr_vl": _paddle,
    "perception_lm": _perception,
    "pix2struct": _flattened,
    "pp_formulanet": _pixels_alone,
    "kimi_k25": _paddle,
    "qwen2_5_omni_thinker": _omni,
    "qwen3_omni_moe_thinker": _omni,
    "step3p7": _local,
    "t5gemma2": _seq2seq,
    "udop": _udop,
    "unlimited_ocr": _local,
    "video_llama_3": _video_llama,
    "vision-encoder-decoder": _pixels_alone,
}
