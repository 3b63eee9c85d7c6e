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
_EXPERTS = {
    **{name: stem for name, stem in _LAYER.items() if not name.startswith("mlp.")},
    **_HEAD_NORMS,
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts": "experts",
}
_FOUR_NORMS = {
    **_LAYER,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_OPT = {
    "self_attn_layer_norm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_output",
    "final_layer_norm": "ffn_norm",
    "fc1": "ffn_up",
    "fc2": "ffn_down",
}
_GELU = ("gelu_pytorch_tanh", "gelu_new")
_FULL, _SLIDING = "full_attention", "sliding_attention"

NO_WINDOW = 1 << 30
"""The window of layers that have none, where llama.cpp's graph wants one: longer than any text."""


@dataclass(frozen=True)
class Architecture:
    """A decoder as llama.cpp knows it.

    name: its `general.architecture`. layer: names of a layer's modules, as Hugging Face has them,
    to those in the file. interleaved: rotary pairs are neighbours there, halves of a head here.
    activations: of the feed-forward part. norm_offset: what is added to the weights of norms.
    free_width: a head's width times the number of heads may differ from the model's width.
    rope_factors: the graph takes a table of frequency factors.
    sections: rotary positions have the axes time, height and width.
    experts: the feed-forward part is a mixture of experts.
    deepstack: visual features are added behind the first layers.
    ahead: prompts may hold parts whose tokens see each other, ahead too.
    windows: layers may look back through a window. always_windows: the graph asks for one.
    query: the tensor that makes up for the scale of attention scores, which llama.cpp computes by
    itself: 1 / sqrt(head width), or 1 / sqrt(width / heads) in a file of `large` layers.
    attention_scale, logit_scale: the graph takes them. softcaps: of scores and logits.
    divided: the graph multiplies the states that it is given by the square root of the width.
    state_scale: its states are this times as large as the model's.
    """

    name: str
    layer: Mapping[str, str]
    interleaved: bool = False
    activations: tuple[str, ...] = ("silu", "swish")
    norm_offset: float = 0.0
    free_width: bool = False
    rope_factors: bool = False
    sections: bool = False
    experts: bool = False
    deepstack: bool = False
    ahead: bool = False
    windows: bool = False
    always_windows: bool = False
    query: str = ""
    large: int = 0
    attention_scale: bool = False
    logit_scale: bool = False
    softcaps: bool = False
    divided: bool = False
    state_scale: float = 1.0


_LLAMA = Architecture("llama", _LAYER, interleaved=True, free_width=True, rope_factors=True)
# The graph of qwen2vl, but one that reads the epsilon of its norms; that one takes it to be zero.
_QWEN_VL = Architecture("paddleocr", _LAYER, free_width=True, sections=True)
_QWEN3_VL = Architecture(
    "qwen3vl", {**_LAYER, **_HEAD_NORMS}, free_width=True, sections=True, deepstack=True
)
_GEMMA3 = Architecture(
    "gemma3", {**_FOUR_NORMS, **_HEAD_NORMS}, activations=_GELU, norm_offset=1.0, free_width=True,
    ahead=True, windows=True, query="attn_q_norm", large=62,
)  # fmt: skip
# OPT has no graph there. GPT-2's is the same but for GELU where OPT has ReLU, and gelu(k x) / k is
# ReLU for a large k. So all states are k times the model's: norms take that off, weights that write
# into the states put it on, and none gets too small for the scales of a number format.
_OPT_SCALE = 512.0

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2", _LAYER),
    "qwen3": Architecture("qwen3", {**_LAYER, **_HEAD_NORMS}, free_width=True),
    "qwen3_moe": Architecture("qwen3moe", _EXPERTS, free_width=True, experts=True),
    "qwen2_vl_text": _QWEN_VL,
    "qwen2_5_vl_text": _QWEN_VL,
    "qwen3_vl_text": _QWEN3_VL,
    "qwen3_vl_moe_text": Architecture(
        "qwen3vlmoe", _EXPERTS, free_width=True, sections=True, deepstack=True, experts=True
    ),
    "gemma": Architecture(
        "gemma", _LAYER, activations=_GELU, norm_offset=1.0, free_width=True, ahead=True,
        divided=True,
    ),
    "gemma2": Architecture(
        "gemma2", _FOUR_NORMS, activations=_GELU, norm_offset=1.0, free_width=True, ahead=True,
        windows=True, always_windows=True, query="attn_q", large=46, softcaps=True, divided=True,
    ),
    "gemma3_text": _GEMMA3,
    "granite": Architecture(
        "granite", _LAYER, interleaved=True, free_width=True, rope_factors=True,
        attention_scale=True, logit_scale=True,
    ),
    "opt": Architecture("gpt2", _OPT, activations=("relu",), state_scale=_OPT_SCALE),
}  # fmt: skip
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
            f"It runs {', '.join(ARCHITECTURES)}; use --runtime torch for this backbone.",
        )
    known = architecture.ahead or architecture.deepstack or _text_alone(backbone)
    if not backbone.family.causal_prompt and not known:
        raise _unfit(backbone, "prompt that looks ahead, or visual features between its layers")
    problem = next(_misfits(backbone, architecture), None)
    if problem is not None:
        raise _unfit(backbone, problem)
    return architecture


def _text_alone(backbone: Backbone) -> bool:
    """Whether it is a language model that sees no images."""
    config = backbone.model.config
    return config.get_text_config() is config


def _unfit(backbone: Backbone, what: str) -> UnsupportedBackboneError:
    return UnsupportedBackboneError(
        f"The decoder of {backbone.name} has {what}, which the llama.cpp runtime does not run.",
        "Use --runtime torch for this backbone.",
    )


def _misfits(backbone: Backbone, architecture: Architecture) -> Iterator[str]:
    """What llama.cpp's graph would do otherwise than this decoder, in words."""
    config = backbone.text_config
    width, heads = head_width(backbone), int(config.num_attention_heads)
    if activation_of(config) not in architecture.activations:
        yield f"activation {activation_of(config)!r}"
    if not architecture.free_width and width * heads != backbone.width:
        yield "heads that are not as wide together as its states"
    if architecture.name == "gemma3" and config.use_bidirectional_attention:
        yield "attention that always looks ahead"
    if getattr(backbone.head, "bias", None) is not None:
        yield "a bias in its head"
    if backbone.norm is None:
        yield "no norm before its head"
    if architecture.state_scale == 1.0:
        yield from _unfit_attention(backbone, architecture)
        yield from _unfit_positions(backbone, architecture)
    elif not config.do_layer_norm_before or not config.enable_bias:
        yield "norms behind its layers, or no biases"
    elif not config.layer_norm_elementwise_affine:
        yield "norms without weights"
    if architecture.experts and not getattr(config, "norm_topk_prob", True):
        yield "experts whose weights do not add up to one"
    if backbone.softcap is None if architecture.softcaps else backbone.softcap is not None:
        yield "a soft cap on logits" if backbone.softcap else "no soft cap on its logits"
    if backbone._scale != 1.0:
        yield "scaled states before its head"
    if backbone.family.logit_scale != 1.0 and not architecture.logit_scale:
        yield "scaled logits"
    for layer in backbone.layers:
        unknown = [n for n, _ in layer.named_parameters() if _name(architecture, n) is None]
        if unknown:
            yield f"the tensor {unknown[0]!r}"


def _unfit_positions(backbone: Backbone, architecture: Architecture) -> Iterator[str]:
    config, width = backbone.text_config, head_width(backbone)
    for kind in dict.fromkeys(layer_kinds(backbone)):
        named = _rope_type(config, kind)
        scaling = getattr(backbone.stack.rotary_emb, _rotary_name(backbone, kind, "scaling"))
        frequencies = inverse_frequencies(backbone, kind)
        if named in ("dynamic", "longrope") or scaling != 1.0:
            yield f"rotary positions of the type {named!r}"
        elif frequencies.numel() * 2 != width:
            yield "rotary positions on a part of each head"
        elif not architecture.rope_factors and (
            linear_factor(backbone, kind) is None
            or (kind == _SLIDING and linear_factor(backbone, kind) != 1.0)
        ):
            yield f"rotary positions of the type {named!r}"
    if architecture.sections != ("mrope_section" in (config.rope_parameters or {})):
        yield "rotary positions on other axes"


def _unfit_attention(backbone: Backbone, architecture: Architecture) -> Iterator[str]:
    config, attention = backbone.text_config, backbone.layers[0].self_attn
    plain = abs(float(attention.scaling) - head_width(backbone) ** -0.5) < 1e-6
    if not (plain or architecture.query or architecture.attention_scale):
        yield "attention scores of another scale"
    if getattr(config, "attn_logit_softcapping", None) and not architecture.softcaps:
        yield "a soft cap on attention scores"
    kinds = set(layer_kinds(backbone))
    undeclared = not getattr(config, "layer_types", None) and getattr(
        config, "sliding_window", None
    )
    if not architecture.windows and (kinds != {_FULL} or undeclared):
        yield "sliding windows"
    elif kinds - {_FULL, _SLIDING}:
        yield f"layers of the kind {sorted(kinds - {_FULL, _SLIDING})[0]!r}"


def activation_of(config: Any) -> str | None:
    """What the feed-forward part of a decoder's layers has between its products."""
    names = ("hidden_activation", "hidden_act", "activation_function")
    return next((getattr(config, n) for n in names if getattr(config, n, None)), None)


def layer_kinds(backbone: Backbone) -> list[str]:
    """Of each layer: whether it sees all, or through a window."""
    kinds = getattr(backbone.text_config, "layer_types", None)
    return list(kinds or [_FULL] * backbone.depth)


def head_width(backbone: Backbone) -> int:
    """Width of one attention head."""
    config = backbone.text_config
    width = getattr(config, "head_dim", None)
    return int(width or backbone.width // config.num_attention_heads)


# -- rotary positions -------------------------------------------------------------------------


def _rope(config: Any, kind: str) -> dict[str, Any]:
    parameters = getattr(config, "rope_parameters", None) or {}
    return dict(parameters.get(kind, parameters))


def _rope_type(config: Any, kind: str) -> str:
    return str(_rope(config, kind).get("rope_type", "default"))


def _rotary_name(backbone: Backbone, kind: str, what: str) -> str:
    """The attribute of the rotary module that holds a kind of layer's frequencies or scaling."""
    name = {"scaling": "attention_scaling", "frequencies": "inv_freq"}[what]
    own = f"{kind}_{name}"
    return own if hasattr(backbone.stack.rotary_emb, own) else name


def inverse_frequencies(backbone: Backbone, kind: str = _FULL) -> Tensor:
    """By what each rotary pair [head width / 2] turns from one position to the next."""
    name = _rotary_name(backbone, kind, "frequencies")
    frequencies: Tensor = getattr(backbone.stack.rotary_emb, name)
    return frequencies.float().cpu()


def rope_base(backbone: Backbone, kind: str = _FULL) -> float:
    """The base of the rotary frequencies."""
    return float(_rope(backbone.text_config, kind).get("rope_theta", 10000.0))


def _factors(backbone: Backbone, kind: str) -> Tensor:
    used = inverse_frequencies(backbone, kind)
    width = 2 * used.numel()
    plain = rope_base(backbone, kind) ** -(torch.arange(0, width, 2, dtype=torch.float) / width)
    return plain / used


def rope_factors(backbone: Backbone) -> Tensor | None:
    """By how much each rotary frequency [head width / 2] is divided; None where all by one."""
    factors = _factors(backbone, _FULL)
    return None if torch.allclose(factors, torch.ones_like(factors), rtol=1e-5) else factors


def linear_factor(backbone: Backbone, kind: str = _FULL) -> float | None:
    """By how much all rotary frequencies are divided; None where not all by the same."""
    factors = _factors(backbone, kind)
    if not torch.allclose(factors, factors[:1].expand_as(factors), rtol=1e-5):
        return None
    factor = float(factors.mean())
    return 1.0 if abs(factor - 1.0) < 1e-5 else round(factor, 4)


# -- what a file says -------------------------------------------------------------------------


def settings(
    backbone: Backbone, architecture: Architecture, layers: list[int], deepstack: int
) -> Iterator[tuple[str, Any]]:
    """The architecture's metadata in a file, by key without its name.

    layers: of the decoder, those in the file; an exit's is the one that it stands before.
    deepstack: behind how many of them visual features are added.
    """
    config, scale = backbone.text_config, architecture.state_scale
    yield "context_length", int(config.max_position_embeddings)
    yield "embedding_length", backbone.width
    yield "block_count", len(layers)
    yield "attention.head_count", int(config.num_attention_heads)
    if scale != 1.0:
        yield "feed_forward_length", int(config.ffn_dim)
        assert backbone.norm is not None
        yield "attention.layer_norm_epsilon", float(backbone.norm.eps) * scale**2
        return
    yield "attention.head_count_kv", int(config.num_key_value_heads)
    yield "feed_forward_length", int(config.intermediate_size)
    yield "attention.key_length", head_width(backbone)
    yield "attention.value_length", head_width(backbone)
    yield "rope.dimension_count", head_width(backbone)
    yield "rope.freq_base", rope_base(backbone)
    yield "attention.layer_norm_rms_epsilon", float(config.rms_norm_eps)
    factor = linear_factor(backbone)
    if not architecture.rope_factors and factor != 1.0:
        yield "rope.scaling.type", "linear"
        yield "rope.scaling.factor", factor
    if architecture.sections:
        section = [int(n) for n in config.rope_parameters["mrope_section"]]
        yield "rope.dimension_sections", [*section, 0, 0, 0][:4]
    if architecture.deepstack:
        yield "n_deepstack_layers", deepstack
    if architecture.experts:
        yield "expert_count", int(config.num_experts)
        yield "expert_used_count", int(config.num_experts_per_tok)
        yield "expert_feed_forward_length", int(config.moe_intermediate_size)
    if architecture.attention_scale:
        yield "attention.scale", float(backbone.layers[0].self_attn.scaling)
        yield "residual_scale", float(config.residual_multiplier)
    if architecture.logit_scale:
        yield "logit_scale", 1.0 / backbone.family.logit_scale
    if architecture.softcaps:
        yield "attn_logit_softcapping", float(config.attn_logit_softcapping)
        yield "final_logit_softcapping", float(backbone.softcap or 0.0)
    yield from _windows(backbone, architecture, layers)


def _windows(
    backbone: Backbone, architecture: Architecture, layers: list[int]
) -> Iterator[tuple[str, Any]]:
    if not architecture.windows:
        return
    kinds = layer_kinds(backbone)
    sliding = [kinds[layer] == _SLIDING for layer in layers]
    if any(sliding):
        yield "attention.sliding_window", int(backbone.text_config.sliding_window)
        yield "attention.sliding_window_pattern", sliding
        yield "rope.freq_base_swa", rope_base(backbone, _SLIDING)
    elif architecture.always_windows:  # a file without a window would abort the process
        yield "attention.sliding_window", NO_WINDOW
        yield "attention.sliding_window_pattern", [True] * len(layers)


def input_scale(backbone: Backbone, architecture: Architecture) -> float:
    """What states are multiplied by before they go into a file's graph."""
    return backbone.width**-0.5 if architecture.divided else architecture.state_scale


# -- a layer's tensors ------------------------------------------------------------------------


def layer_tensors(
    layer: nn.Module, architecture: Architecture, backbone: Backbone, layers: int
) -> Iterator[tuple[str, Tensor]]:
    """A decoder layer's tensors by their names in the file, less the layer's number.

    layers: in the file.
    """
    found = dict(_tensors(layer, architecture, backbone))
    query = architecture.query
    if query:
        found[f"{query}.weight"] = found[f"{query}.weight"] * _missing_scale(
            layer, architecture, backbone, layers
        )
    if architecture.state_scale != 1.0:
        _scale_states(found, architecture.state_scale)
        for part in ("weight", "bias"):
            fused = [found.pop(f"attn_{name}.{part}") for name in "qkv"]
            found[f"attn_qkv.{part}"] = torch.cat(fused)
    yield from found.items()


def _tensors(
    layer: nn.Module, architecture: Architecture, backbone: Backbone
) -> Iterator[tuple[str, Tensor]]:
    config = backbone.text_config
    heads = {
        "attn_q": config.num_attention_heads,
        "attn_k": getattr(config, "num_key_value_heads", config.num_attention_heads),
    }
    for name, value in float_state(layer).items():
        tensor = value.detach().float().cpu()
        stem, part = _name(architecture, name) or ("", "")
        if not stem:
            raise _unfit(backbone, f"the tensor {name!r}")
        if stem == "experts":
            yield from _experts(part, tensor)
            continue
        if architecture.interleaved and stem in heads:
            tensor = _interleave(tensor, heads[stem])
        if stem.endswith("norm") and part == "weight":
            tensor = tensor + architecture.norm_offset
        yield f"{stem}.{part}", tensor


def _experts(part: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Of all experts in one tensor [experts, rows, columns]."""
    if part == "gate_up_proj":
        gate, up = tensor.chunk(2, dim=1)
        yield "ffn_gate_exps.weight", gate
        yield "ffn_up_exps.weight", up
    else:
        yield "ffn_down_exps.weight", tensor


def _missing_scale(
    layer: nn.Module, architecture: Architecture, backbone: Backbone, layers: int
) -> float:
    """The layer's scale of attention scores over that which llama.cpp computes for the file."""
    large = layers == architecture.large
    heads = int(backbone.text_config.num_attention_heads)
    base = backbone.width // heads if large else head_width(backbone)
    scale: float = layer.self_attn.scaling * base**0.5  # type: ignore[union-attr]
    return scale


def _scale_states(found: dict[str, Tensor], scale: float) -> None:
    """Have a layer take and give states that are `scale` times as large.

    `ffn_down` stays: what it is given is larger by that already.
    """
    for name in ("attn_output.weight", "attn_output.bias", "ffn_up.weight", "ffn_up.bias",
                 "ffn_down.bias"):  # fmt: skip
        found[name] = found[name] * scale


def _name(architecture: Architecture, name: str) -> tuple[str, str] | None:
    module, _, part = name.rpartition(".")
    stem = architecture.layer.get(module)
    return None if stem is None else (stem, part)


def _interleave(tensor: Tensor, heads: int) -> Tensor:
    """Rows [heads * width, ...] of a query or key projection, so that the two of each rotary pair,
    which here stand half a head apart, become neighbours."""
    rows = tensor.view(heads, 2, -1, *tensor.shape[1:])
    return rows.transpose(1, 2).reshape(tensor.shape)
