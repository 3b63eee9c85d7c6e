"""Which decoders llama.cpp can run, and what their parts are called in a GGUF file.

A decoder is written only where every tensor and every setting of it has a place there: what has
none would be lost without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import UnsupportedBackboneError
from offramp.models.backbone import Backbone
from offramp.models.quantized.weights import float_state

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}


@dataclass(frozen=True)
class Architecture:
    """A decoder as llama.cpp knows it.

    name: its `general.architecture`. layer: names of a layer's modules, as Hugging Face has them,
    to those in the file. interleaved: rotary pairs are neighbours there, halves of a head here.
    activations: of the feed-forward part. norm_offset: what is added to the weights of norms.
    free_width: a head's width times the number of heads may differ from the model's width.
    rope_factors: the graph takes a table of frequency factors. scaled_input: the graph multiplies
    the embeddings that it is given by the square root of the width.
    """

    name: str
    layer: Mapping[str, str]
    interleaved: bool = False
    activations: tuple[str, ...] = ("silu", "swish")
    norm_offset: float = 0.0
    free_width: bool = False
    rope_factors: bool = False
    scaled_input: bool = False


_LLAMA = Architecture("llama", _LAYER, interleaved=True, free_width=True, rope_factors=True)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2", _LAYER),
    "qwen3": Architecture("qwen3", {**_LAYER, **_HEAD_NORMS}, free_width=True),
}
"""By the `model_type` of the text config."""


def architecture_of(backbone: Backbone) -> Architecture:
    """The decoder's architecture.

    Raises:
        UnsupportedBackboneError: llama.cpp's graph is not this decoder's, in kind or in a setting.
    """
    config = backbone.text_config
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None or backbone.is_encoder_decoder:
        raise UnsupportedBackboneError(
            f"The llama.cpp runtime does not run the decoder {config.model_type!r}.",
            f"It runs {', '.join(ARCHITECTURES)}; use --engine torch for this backbone.",
        )
    if not backbone.family.causal_prompt:
        raise _unfit(backbone, "prompt that looks ahead, or visual features between its layers")
    problem = next(_misfits(backbone, architecture), None)
    if problem is not None:
        raise _unfit(backbone, problem)
    return architecture


def _unfit(backbone: Backbone, what: str) -> UnsupportedBackboneError:
    return UnsupportedBackboneError(
        f"The decoder of {backbone.name} has {what}, which the llama.cpp runtime does not run.",
        "Use --engine torch for this backbone.",
    )


def _misfits(backbone: Backbone, architecture: Architecture) -> Iterator[str]:
    """What llama.cpp's graph would do otherwise than this decoder, in words."""
    config, attention = backbone.text_config, backbone.layers[0].self_attn
    width, heads = head_width(backbone), int(config.num_attention_heads)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or (
        not hasattr(config, "layer_types") and getattr(config, "sliding_window", None)
    ):
        yield "sliding windows"
    activation = getattr(config, "hidden_act", None)
    if activation not in architecture.activations:
        yield f"activation {activation!r}"
    if abs(float(attention.scaling) - width**-0.5) > 1e-6:
        yield "attention scores of another scale"
    if not architecture.free_width and width * heads != backbone.width:
        yield "heads that are not as wide together as its states"
    rotary = backbone.stack.rotary_emb
    if _rope_type(config) in ("dynamic", "longrope") or rotary.attention_scaling != 1.0:
        yield f"rotary positions of the type {_rope_type(config)!r}"
    elif rotary.inv_freq.numel() * 2 != width:
        yield "rotary positions on a part of each head"
    elif not architecture.rope_factors and rope_factors(backbone) is not None:
        yield f"rotary positions of the type {_rope_type(config)!r}"
    if getattr(backbone.head, "bias", None) is not None:
        yield "a bias in its head"
    for layer in backbone.layers:
        unknown = [n for n, _ in layer.named_parameters() if _name(architecture, n) is None]
        if unknown:
            yield f"the tensor {unknown[0]!r}"


def _rope_type(config: Any) -> str:
    return str((getattr(config, "rope_parameters", None) or {}).get("rope_type", "default"))


def head_width(backbone: Backbone) -> int:
    """Width of one attention head."""
    config = backbone.text_config
    width = getattr(config, "head_dim", None)
    return int(width or backbone.width // config.num_attention_heads)


def rope_base(backbone: Backbone) -> float:
    """The base of the rotary frequencies."""
    parameters = getattr(backbone.text_config, "rope_parameters", None) or {}
    return float(parameters.get("rope_theta", 10000.0))


def rope_factors(backbone: Backbone) -> Tensor | None:
    """By how much each rotary frequency [head width / 2] is divided; None where all by one."""
    used = backbone.stack.rotary_emb.inv_freq.float().cpu()
    width = 2 * used.numel()
    plain = rope_base(backbone) ** -(torch.arange(0, width, 2, dtype=torch.float) / width)
    factors = plain / used
    return None if torch.allclose(factors, torch.ones_like(factors), rtol=1e-5) else factors


def layer_tensors(
    layer: nn.Module, architecture: Architecture, backbone: Backbone
) -> Iterator[tuple[str, Tensor]]:
    """A decoder layer's tensors by their names in the file, less the layer's number."""
    config = backbone.text_config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, value in float_state(layer).items():
        tensor = value.detach().float().cpu()
        stem, part = _name(architecture, name) or ("", "")
        if not stem:
            raise _unfit(backbone, f"the tensor {name!r}")
        if architecture.interleaved and stem in heads:
            tensor = _interleave(tensor, heads[stem])
        if stem.endswith("norm") and part == "weight":
            tensor = tensor + architecture.norm_offset
        yield f"{stem}.{part}", tensor


def _name(architecture: Architecture, name: str) -> tuple[str, str] | None:
    module, _, part = name.rpartition(".")
    stem = architecture.layer.get(module)
    return None if stem is None else (stem, part)


def _interleave(tensor: Tensor, heads: int) -> Tensor:
    """Rows [heads * width, ...] of a query or key projection, so that the two of each rotary pair,
    which here stand half a head apart, become neighbours."""
    rows = tensor.view(heads, 2, -1, *tensor.shape[1:])
    return rows.transpose(1, 2).reshape(tensor.shape)
