"""Projectors (mmproj) of tiny random families, as llama.cpp's converter writes them, and what a
family's processor makes of the same pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import families
import numpy as np
import torch
from hub_files import WORDS
from torch import Tensor

FRAMES = {
    "qwen": {4: "<|vision_start|>", 5: "<|vision_end|>"},
    "gemma3": {4: "<start_of_image>", 5: "<end_of_image>"},
    "smolvlm": {4: "<fake_token_around_image>", 5: "<global-img>", 7: "<row_1_col_1>", 95: "ĊĊ"},
}
"""What libmtmd writes around images."""
SIZES = {"qwen": ((144, 32), (32, 64)), "gemma3": ((28, 28),) * 2, "smolvlm": ((32, 32),) * 2}
"""Width and height of two pictures that need no resizing: Qwen takes from 8 tokens on, and the
first is wider than a window of its tower."""
Tensors = Iterator[tuple[str, Tensor]]


def kind_of(name: str) -> str:
    return name.partition("2")[0].partition("3-")[0] if name.startswith("qwen") else name


def words_of(name: str) -> list[str]:
    named = FRAMES[kind_of(name)]
    return [named.get(n, word) for n, word in enumerate(WORDS)]


def pictures(name: str) -> list[np.ndarray[Any, Any]]:
    """[H, W, 3], of bytes."""
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in SIZES[kind_of(name)]]


def inputs_of(name: str, ids: Sequence[int], shown: Sequence[Any]) -> dict[str, Tensor]:
    """What the model's own processor returns for token ids with pictures between them, each behind
    the word that opens it."""
    kind = kind_of(name)
    tokens = [_tokens(kind, picture) for picture in shown for _ in range(1 + (kind == "smolvlm"))]
    row: list[int] = []
    opens = {"qwen": (4,), "gemma3": (4,), "smolvlm": (5, 7)}[kind]
    for token in ids:
        row.append(token)
        if token in opens:
            row += [families.IMAGE] * tokens.pop(0)
    assert not tokens
    input_ids = torch.tensor([row])
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    images = (input_ids == families.IMAGE).int()
    values = [torch.from_numpy(each.transpose(2, 0, 1) / 127.5 - 1).float() for each in shown]
    if kind == "qwen":
        grids = [[1, each.shape[1] // 8, each.shape[2] // 8] for each in values]
        return inputs | {
            "pixel_values": torch.cat([_patches(each) for each in values]),
            "image_grid_thw": torch.tensor(grids),
            "mm_token_type_ids": images,
        }
    if kind == "gemma3":
        return inputs | {"pixel_values": torch.stack(values), "token_type_ids": images.long()}
    pixels = torch.stack([each for each in values for _ in range(2)])[None]  # whole, and its tile
    return inputs | {
        "pixel_values": pixels,
        "pixel_attention_mask": torch.ones_like(pixels[:, :, 0], dtype=torch.bool),
    }


def _tokens(kind: str, picture: Any) -> int:
    return picture.shape[0] * picture.shape[1] // 16**2 if kind == "qwen" else 4


def _patches(pixels: Tensor) -> Tensor:
    """As Qwen's processor lays them out: the four that are merged stand together."""
    _, height, width = pixels.shape
    frames = pixels[None].expand(2, -1, -1, -1)
    split = frames.reshape(2, 3, height // 16, 2, 8, width // 16, 2, 8)
    return split.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(-1, 3 * 2 * 8 * 8)


# -- files -----------------------------------------------------------------------------------------


def write_projector(name: str, path: Path) -> Path:
    """Of the family's tiny model."""
    import gguf

    model = families.build(name)
    config = model.config.vision_config
    out = gguf.GGUFWriter(path, "clip")
    out.add_bool("clip.has_vision_encoder", True)
    for key, value in _settings(name, config).items():
        if isinstance(value, bool):
            out.add_bool(f"clip.{key}", value)
        elif isinstance(value, str):
            out.add_string(f"clip.{key}", value)
        elif isinstance(value, float):
            out.add_float32(f"clip.vision.{key}", value)
        elif isinstance(value, list):
            out.add_array(f"clip.vision.{key}", value)
        else:
            out.add_uint32(f"clip.vision.{key}", value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 8)
    for theirs, tensor in _tensors(name, model.state_dict()):
        ours = names.get_name(theirs, (".weight", ".bias")) or theirs
        out.add_tensor(ours, np.ascontiguousarray(tensor.float().numpy()))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def _settings(name: str, config: Any) -> dict[str, Any]:
    kind = kind_of(name)
    heads = getattr(config, "num_attention_heads", None) or config.num_heads
    layers = getattr(config, "num_hidden_layers", None) or config.depth
    width = getattr(config, "embed_dim", config.hidden_size)
    inner = getattr(config, "intermediate_size", 2 * width)
    told: dict[str, Any] = {
        "image_size": getattr(config, "image_size", 32), "patch_size": config.patch_size,
        "embedding_length": width, "feed_forward_length": inner, "block_count": layers,
        "projection_dim": families.WIDTH, "attention.head_count": heads,
        "attention.layer_norm_epsilon": float(getattr(config, "layer_norm_eps", 1e-6)),
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    if kind == "gemma3":
        return told | {"projector_type": "gemma3", "use_gelu": True, "projector.scale_factor": 2}
    if kind == "smolvlm":
        return told | {"projector_type": "idefics3", "use_gelu": True,
                       "projector.scale_factor": 2, "preproc_image_size": 32}  # fmt: skip
    if name == "qwen2-vl":
        return told | {"projector_type": "qwen2vl_merger"}
    if name == "qwen2.5-vl":
        return told | {"projector_type": "qwen2.5vl_merger", "use_silu": True,
                       "n_wa_pattern": 2}  # fmt: skip
    return told | {"projector_type": "qwen3vl_merger", "use_gelu": True, "spatial_merge_size": 2,
                   "is_deepstack_layers": [True] * layers}  # fmt: skip


def _tensors(name: str, state: dict[str, Tensor]) -> Tensors:
    """The names that checkpoints on the hub have."""
    for path, tensor in state.items():
        key = path.removeprefix("model.")
        if key.startswith("visual."):
            yield from _qwen(name, key, tensor)
        elif key.startswith("vision_tower."):
            inner = key.removeprefix("vision_tower.").removeprefix("vision_model.")
            yield f"vision_tower.vision_model.{inner}", tensor
        elif key.startswith(("vision_model.", "connector.")):
            yield f"model.{key}", tensor
        elif key.startswith("multi_modal_projector."):
            added = 1 if "soft_emb_norm" in key else 0
            yield key.replace("_weight", ".weight"), tensor + added


def _qwen(name: str, key: str, tensor: Tensor) -> Tensors:
    if "patch_embed.proj.weight" in key:
        yield "v.patch_embd.weight", tensor[:, :, 0]
        yield "v.patch_embd.weight.1", tensor[:, :, 1]
    elif ".qkv." in key and not name.startswith("qwen3"):
        for part, rows in zip("qkv", tensor.chunk(3), strict=True):
            yield key.replace("qkv", part), rows
    elif "deepstack_merger_list" in key:
        _, _, place, part, kind = key.split(".")
        short = {"norm": "norm", "linear_fc1": "fc1", "linear_fc2": "fc2"}[part]
        yield f"v.deepstack.{place}.{short}.{kind}", tensor
    elif name.startswith("qwen3") and key.startswith("visual.merger."):
        _, _, part, kind = key.split(".")
        short = {"linear_fc1": "mm.0", "linear_fc2": "mm.2", "norm": "v.post_ln"}[part]
        yield f"{short}.{kind}", tensor
    else:
        yield key, tensor
