"""A backbone's vision tower and projector as a file for libmtmd: an mmproj GGUF.

Weights are the model's own, in a number format; norms, biases, positions and the patches' weights
stay in float32, as llama.cpp's converter leaves them. Whether a file makes of a picture what the
model makes of it is tried out: kinds are known by their names, and a model of a kind may differ.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from offramp.core.errors import DataError, InputError, UnsupportedBackboneError, did_you_mean
from offramp.core.models.backbone import Backbone
from offramp.core.models.discovery.twin import graft, twin
from offramp.core.models.weights import float_copy, float_dtype, scheme
from offramp_llama_cpp.architectures import array_of
from offramp_llama_cpp.gguf_writing import VISION_FORMATS, add_array, add_value, new_file
from offramp_llama_cpp.packages import import_gguf
from offramp_llama_cpp.projector import Pixels, Tower
from offramp_llama_cpp.segment import EngineOptions

log = logging.getLogger(__name__)

TOLERANCES = dict(zip(VISION_FORMATS, (0.02, 0.02, 0.1, 0.4), strict=True))
"""By number format, how far image tokens may be from the model's own, as a share of their length;
llama.cpp's attention rounds to float16 in all of them."""
Named = Iterator[tuple[str, Tensor]]


# -- kinds -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of towers that libmtmd knows.

    config: what its file says besides what all say, of the model's configuration and the image
    processor's longest side, or why it cannot be such a file. tensors: of the model's state, by the
    names that llama.cpp's converter reads or writes. inputs: what the model is given of a picture
    [3, H, W], and pictures: of which pictures a call of its tower is. standing: what the tower
    returns in whose place their rows [T, 1 + features, D] are known, so that the model hands them
    on, through an empty projector where there is one. projector: the module after the tower; None:
    it is part of it.
    """

    config: Callable[[Any, int | None], Mapping[str, Any] | str]
    tensors: Callable[[Any, str, Tensor], Named]
    inputs: Callable[[Any, Tensor], dict[str, Tensor]]
    pictures: Callable[[Any, Mapping[str, Any]], Sequence[Tensor]]
    standing: Callable[[Any, Sequence[Tensor]], Any]
    projector: str | None = None


def _of_vision(key: str, tensor: Tensor) -> Named:
    """The tensors of a CLIP or SigLIP tower, by name."""
    inner = key.partition(".")[2].removeprefix("vision_model.")
    if not inner.startswith("head."):
        yield f"vision_tower.vision_model.{inner}", tensor


def _llava_config(config: Any, _: int | None) -> Mapping[str, Any] | str:
    vision, layer = config.vision_config, config.vision_feature_layer
    if vision.model_type not in ("clip_vision_model", "siglip_vision_model"):
        return f"its tower is a {vision.model_type}, and CLIP and SigLIP are known"
    if not isinstance(layer, int):
        return f"it reads several of its tower's layers, {layer}"
    has_class = vision.model_type == "clip_vision_model"
    if has_class != (config.vision_feature_select_strategy == "default"):
        return f"its features are selected by {config.vision_feature_select_strategy!r}"
    if config.projector_hidden_act != "gelu" or not config.multimodal_projector_bias:
        return "its projector is no two layers with biases and a GELU between them"
    layers = layer if layer >= 0 else vision.num_hidden_layers + 1 + layer
    said = {"projector_type": "mlp", "block_count": layers, "feature_layer": [layers]}
    return said | _activation(vision.hidden_act)


def _activation(name: str) -> dict[str, Any]:
    return {} if name == "quick_gelu" else {"use_silu" if name == "silu" else "use_gelu": True}


def _llava_tensors(config: Any, key: str, tensor: Tensor) -> Named:
    if key.startswith("vision_tower."):
        for name, part in _of_vision(key, tensor):
            if "post_layernorm" not in name:  # after the layer that is read
                yield name, part
    elif key.startswith("multi_modal_projector."):
        _, linear, kind = key.split(".")
        yield f"mm.{dict(linear_1=0, linear_2=2)[linear]}.{kind}", tensor


def _llava_standing(config: Any, rows: Sequence[Tensor]) -> Any:
    tokens = torch.stack([each[:, 0] for each in rows])
    if config.vision_feature_select_strategy == "default":  # the first row is dropped
        tokens = torch.cat([tokens[:, :1], tokens], 1)
    states = (tokens,) * (config.vision_config.num_hidden_layers + 1)
    return BaseModelOutputWithPooling(last_hidden_state=tokens, hidden_states=states)


def _gemma3_config(config: Any, _: int | None) -> Mapping[str, Any]:
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    scale = side // math.isqrt(config.mm_tokens_per_image)
    return {"projector_type": "gemma3", "use_gelu": True, "projector.scale_factor": scale}


def _gemma3_tensors(config: Any, key: str, tensor: Tensor) -> Named:
    if key.startswith("vision_tower."):
        yield from _of_vision(key, tensor)
    elif key.startswith("multi_modal_projector."):
        added = 1 if "soft_emb_norm" in key else 0
        yield key.replace("_weight", ".weight"), tensor + added


def _idefics3_config(config: Any, longest: int | None) -> Mapping[str, Any]:
    return {
        "projector_type": "idefics3",
        "use_gelu": True,
        "projector.scale_factor": config.scale_factor,
        "preproc_image_size": longest or config.vision_config.image_size,
    }


def _idefics3_tensors(config: Any, key: str, tensor: Tensor) -> Named:
    if key.startswith(("vision_model.", "connector.")):
        yield f"model.{key}", tensor


def _last_state(config: Any, rows: Sequence[Tensor]) -> Any:
    tokens = torch.stack([each[:, 0] for each in rows])
    return BaseModelOutputWithPooling(last_hidden_state=tokens)


def _of_one_size(config: Any, call: Mapping[str, Any]) -> Sequence[Tensor]:
    return list(call["pixel_values"])


def _one(config: Any, pixels: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": pixels[None]}


def _one_tile(config: Any, pixels: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": pixels[None, None]}


def _qwen_config(config: Any, _: int | None) -> Mapping[str, Any] | str:
    vision = config.vision_config
    if config.model_type == "qwen2_vl":
        return {"projector_type": "qwen2vl_merger"}
    if config.model_type == "qwen2_5_vl":
        whole = vision.fullatt_block_indexes
        every = whole[0] + 1
        if vision.window_size != 112 or [*whole] != [*range(every - 1, whole[-1] + 1, every)]:
            return "its windows are not those of its checkpoints, which libmtmd takes for granted"
        return {"projector_type": "qwen2.5vl_merger", "use_silu": True, "n_wa_pattern": every}
    deep = [layer in vision.deepstack_visual_indexes for layer in range(vision.depth)]
    return {
        "projector_type": "qwen3vl_merger",
        "use_gelu": True,
        "is_deepstack_layers": deep,
        "spatial_merge_size": vision.spatial_merge_size,
        "image_size": math.isqrt(vision.num_position_embeddings) * vision.patch_size,
    }


def _qwen_tensors(config: Any, key: str, tensor: Tensor) -> Named:
    third = config.model_type.startswith("qwen3")
    if not key.startswith("visual."):
        return
    if "patch_embed.proj.weight" in key:
        yield "v.patch_embd.weight", tensor[:, :, 0]
        yield "v.patch_embd.weight.1", tensor[:, :, 1]
    elif ".qkv." in key and not third:
        for part, rows in zip("qkv", tensor.chunk(3), strict=True):
            yield key.replace("qkv", part), rows
    elif "deepstack_merger_list" in key:
        _, _, place, part, kind = key.split(".")
        layer = config.vision_config.deepstack_visual_indexes[int(place)]
        short = {"norm": "norm", "linear_fc1": "fc1", "linear_fc2": "fc2"}[part]
        yield f"v.deepstack.{layer}.{short}.{kind}", tensor
    elif third and key.startswith("visual.merger."):
        _, _, part, kind = key.split(".")
        short = {"linear_fc1": "mm.0", "linear_fc2": "mm.2", "norm": "v.post_ln"}[part]
        yield f"{short}.{kind}", tensor
    else:
        yield key, tensor


def _qwen_patches(config: Any, pixels: Tensor) -> dict[str, Tensor]:
    """As Qwen's processor lays them out: those that are merged stand together."""
    vision = config.vision_config
    size, merge, frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    _, high, wide = (side // size for side in pixels.shape)
    clip = pixels[None].expand(frames, -1, -1, -1)
    split = clip.reshape(frames, 3, high // merge, merge, size, wide // merge, merge, size)
    rows = split.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(high * wide, -1)
    return {"pixel_values": rows, "image_grid_thw": torch.tensor([[1, high, wide]])}


def _qwen_pictures(config: Any, call: Mapping[str, Any]) -> Sequence[Tensor]:
    vision, grids = config.vision_config, call["grid_thw"].tolist()
    size, merge, frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    pictures = []
    patches = call["pixel_values"].split([math.prod(grid) for grid in grids])
    for (clips, high, wide), rows in zip(grids, patches, strict=True):
        split = rows.reshape(high // merge, wide // merge, merge, merge, 3, frames, size, size)
        seen = split.permute(5, 4, 0, 2, 6, 1, 3, 7).reshape(frames, 3, high * size, wide * size)
        if clips != 1 or not all(torch.equal(seen[0], other) for other in seen):
            raise InputError(
                "A video came, and libmtmd is given single images here.",
                "Give images, or leave out --vision mtmd.",
            )
        pictures.append(seen[0])
    return pictures


def _qwen_standing(config: Any, rows: Sequence[Tensor]) -> Any:
    tokens = torch.cat([*rows])
    made = BaseModelOutputWithPooling(last_hidden_state=tokens[:, 0], pooler_output=tokens[:, 0])
    if deep := tokens.shape[1] - 1:
        from transformers.models.qwen3_vl import modeling_qwen3_vl

        made = modeling_qwen3_vl.BaseModelOutputWithDeepstackFeatures(**made)
        made.deepstack_features = [tokens[:, 1 + place] for place in range(deep)]
    return made


_IDEFICS3 = Kind(
    _idefics3_config, _idefics3_tensors, _one_tile, _of_one_size, _last_state, "model.connector"
)
_QWEN = Kind(_qwen_config, _qwen_tensors, _qwen_patches, _qwen_pictures, _qwen_standing)
_BEHIND = "model.multi_modal_projector"
KINDS: dict[str, Kind] = {
    "llava": Kind(_llava_config, _llava_tensors, _one, _of_one_size, _llava_standing, _BEHIND),
    "gemma3": Kind(_gemma3_config, _gemma3_tensors, _one, _of_one_size, _last_state, _BEHIND),
    "idefics3": _IDEFICS3,
    "smolvlm": _IDEFICS3,
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
}
"""By the model's type."""


def kind_of(backbone: Backbone) -> Kind:
    """Raise `UnsupportedBackboneError` where the backbone's tower is none that is written."""
    kind = KINDS.get(getattr(backbone.model.config, "model_type", ""))
    if kind is None or backbone.family.vision is None:
        raise _unknown(backbone, f"it is a {type(backbone.model).__name__}")
    return kind


def _unknown(backbone: Backbone, why: str) -> UnsupportedBackboneError:
    return UnsupportedBackboneError(
        f"The vision tower of {backbone.name} is none that is written for llama.cpp: {why}.",
        f"Leave out --vision; those of {', '.join(sorted(KINDS))} are written.",
    )


def features_of(backbone: Backbone) -> int:
    """Return after how many of its first layers a decoder adds visual features."""
    vision = getattr(backbone.model.config, "vision_config", None)
    return len(getattr(vision, "deepstack_visual_indexes", None) or ())


# -- files -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Looks:
    """The changes that an image processor makes to pixels: their mean and standard deviation, of 0
    to 1, and the longest side of an image that is cut into tiles, where there is one."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    longest: int | None = None

    @classmethod
    def of(cls, processor: Any) -> Looks:
        """Read a model's processor. Raise `InputError` where it looks at no images."""
        look: Any = getattr(processor, "image_processor", processor)
        mean, std = (getattr(look, f"image_{name}", None) for name in ("mean", "std"))
        if mean is None or std is None:
            raise InputError(
                f"A {type(look).__name__} does not say how it makes numbers of pixels.",
                "Give the model's own processor.",
            )
        size = getattr(look, "size", None) or {}
        size = size if isinstance(size, Mapping) else vars(size)
        return cls(tuple(mean), tuple(std), size.get("longest_edge"))

    def seen(self, pixels: Pixels) -> Tensor:
        """Numbers [3, H, W] of a picture [H, W, 3]."""
        mean, std = (np.array(part, dtype=np.float32) for part in (self.mean, self.std))
        seen = (pixels.astype(np.float32) / 255 - mean) / std
        return torch.from_numpy(np.ascontiguousarray(seen.transpose(2, 0, 1)))

    def pixels(self, seen: Tensor) -> Pixels:
        """The picture [..., H, W, 3] of which a processor made numbers [..., 3, H, W]: to the last
        bit, where it resized bytes."""
        mean, std = (np.array(part, dtype=np.float32) for part in (self.mean, self.std))
        found = seen.detach().float().cpu().movedim(-3, -1).numpy() * std + mean
        return (found * 255).round().clip(0, 255).astype(np.uint8)


def export_vision(backbone: Backbone, file: Path, number_format: str, looks: Looks) -> float:
    """Write a backbone's tower and projector, and return how far its image tokens are from the
    model's own, as a share of their length.

    Raises:
        InputError: the format is not one of `VISION_FORMATS`.
        UnsupportedBackboneError: it is none that is written, or libmtmd computes something else.
    """
    if number_format not in VISION_FORMATS:
        raise InputError(
            f"A vision tower is not written in {number_format!r}.",
            did_you_mean(number_format, VISION_FORMATS),
        )
    kind = kind_of(backbone)
    config = backbone.model.config
    own = kind.config(config, looks.longest)
    if isinstance(own, str):
        raise _unknown(backbone, own)
    common = _common(backbone, looks)
    said = common | {**own} | {"offramp.format": number_format}
    gguf = import_gguf()
    with new_file(file, "clip") as out:
        out.add_type("mmproj")
        for key, value in said.items():
            add_value(out, _key(key, value), value)
        blocks = max(common["block_count"], 8)  # a projector's parts are counted like these
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, blocks)
        for name, tensor in _tensors(kind, config, backbone.model.state_dict()):
            ours = names.get_name(name, (".weight", ".bias")) or name
            if not _is_left_out(ours, said["block_count"]):
                array = array_of(tensor)
                add_array(out, ours, array, _format_of(ours, array, number_format))
    with_products = EngineOptions(threads=torch.get_num_threads())
    tower = Tower(file, with_products, width=backbone.width, features=features_of(backbone))
    try:
        far = check_tower(backbone, tower, looks)
    finally:
        tower.close()
    log.info("the vision tower's tokens are %.2g of their length from the model's own", far)
    return far


def _common(backbone: Backbone, looks: Looks) -> dict[str, Any]:
    config = backbone.model.config.vision_config
    width = getattr(config, "embed_dim", config.hidden_size)
    inner = getattr(config, "intermediate_size", None) or int(width * config.mlp_ratio)
    heads = getattr(config, "num_attention_heads", None) or config.num_heads
    return {
        "has_vision_encoder": True,
        "image_size": getattr(config, "image_size", 560),
        "patch_size": config.patch_size,
        "embedding_length": width,
        "feed_forward_length": inner,
        "block_count": getattr(config, "num_hidden_layers", None) or config.depth,
        "projection_dim": backbone.width,
        "attention.head_count": heads,
        "attention.layer_norm_epsilon": float(getattr(config, "layer_norm_eps", 1e-6)),
        "image_mean": [*map(float, looks.mean)],
        "image_std": [*map(float, looks.std)],
    }


def _key(name: str, value: Any) -> str:
    if name.startswith("offramp."):
        return name
    return f"clip.{name}" if isinstance(value, (bool, str)) else f"clip.vision.{name}"


def _tensors(kind: Kind, config: Any, state: Mapping[str, Tensor]) -> Named:
    for path, tensor in state.items():
        yield from kind.tensors(config, path.removeprefix("model."), tensor)


def _is_left_out(name: str, blocks: int) -> bool:
    """Whether a tensor belongs to a layer above the last that is read."""
    return name.startswith("v.blk.") and int(name.split(".")[2]) >= blocks


def _format_of(name: str, array: Any, number_format: str) -> str:
    """The number format that llama.cpp's converter gives a tensor."""
    if name == "mm.input_projection.weight" and number_format != "f32":
        return "f16"  # it is turned around, which blocks cannot be
    return number_format if array.ndim == 2 and "embd" not in name else "f32"


# -- checks ----------------------------------------------------------------------------------------


def check_tower(backbone: Backbone, tower: Tower, looks: Looks) -> float:
    """Return how far a tower's tokens of two pictures are from the model's own in float32, as a
    share of their length.

    Raises:
        UnsupportedBackboneError: farther than rounding to its format takes them.
    """
    number_format = str(tower.said.get("offramp.format", ""))
    most = TOLERANCES.get(number_format, max(TOLERANCES.values()))
    kind, far = kind_of(backbone), 0.0
    for picture in _pictures(backbone):
        own = _own_rows(backbone, kind, looks.seen(picture))
        try:
            made = tower.rows(picture)
        except (InputError, DataError) as error:
            raise _other(backbone, error.problem) from error
        far = max(far, _distance(made, own))
    if not far <= most:
        raise _other(backbone, f"it is {far:.2g} away, and rounding at most {most:g}")
    return far


def _other(backbone: Backbone, why: str) -> UnsupportedBackboneError:
    return UnsupportedBackboneError(
        f"llama.cpp does not see with the vision tower of {backbone.name} what the model sees: "
        f"{why.rstrip('.')}.",
        "Leave out --vision: PyTorch or another engine sees with it.",
    )


def _pictures(backbone: Backbone) -> list[Pixels]:
    """Coarse and fine noise, as large as the tower sees it; of one that takes any size, wider than
    its windows."""
    config = backbone.model.config.vision_config
    if hasattr(config, "spatial_merge_size"):
        unit = config.patch_size * config.spatial_merge_size
        high, wide = 9 * unit, 10 * unit
    else:
        high = wide = config.image_size
    draw = np.random.default_rng(0)
    coarse = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    rows, columns = (np.arange(side) * 8 // side for side in (high, wide))
    fine = draw.integers(0, 256, (high, wide, 3), dtype=np.uint8)
    return [coarse[rows][:, columns], fine]


@torch.inference_mode()
def _own_rows(backbone: Backbone, kind: Kind, seen: Tensor) -> Any:
    """The model's own rows [T, 1 + features, D] of a picture, in float32."""
    root: Any = twin(backbone.model)
    for path in filter(None, (backbone.family.vision, kind.projector)):
        own = backbone.model.get_submodule(path)
        if scheme(own) is not None or float_dtype(own) != torch.float32:
            own = float_copy(own, torch.float32).float()
        graft(root, path, own)
    inputs = kind.inputs(backbone.model.config, seen)
    found = root.base_model.get_image_features(**inputs, return_dict=True)
    parts = [found.pooler_output, *(getattr(found, "deepstack_features", None) or ())]
    rows = [torch.cat([part.flatten(0, -2) for part in parts_of]) for parts_of in parts]
    return torch.stack(rows, 1).float().numpy()


def _distance(made: Any, own: Any) -> float:
    if made.shape != own.shape:
        return math.inf
    return float(np.linalg.norm(made - own) / (np.linalg.norm(own) or 1.0))
