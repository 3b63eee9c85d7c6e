"""Which decoders llama.cpp can run, and what their parts are called in a GGUF file.

A decoder is written only where every tensor and every setting of it has a place there: what has
none would be lost without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offramp.core.errors import UnsupportedBackboneError
from offramp.core.models.backbone import Backbone
from offramp.core.models.sharding import gathered
from offramp.core.models.weights import float_copy, float_dtype, scheme
from offramp_llama_cpp.graphs import (
    ARCHITECTURES,
    FULL,
    SLIDING,
    Architecture,
    Array,
    layer_arrays,
    own_scale,
    window_settings,
)


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
    known = architecture.ahead or architecture.deepstack or backbone.text_only
    if not backbone.family.causal_prompt and not known:
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
    """The differences between llama.cpp's graph and this decoder, in words."""
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
        yield "norms after its layers, or no biases"
    elif not config.layer_norm_elementwise_affine:
        yield "norms without weights"
    if architecture.experts and not getattr(config, "norm_topk_prob", True):
        yield "experts whose weights do not add up to one"
    if backbone.softcap is None if architecture.softcaps else backbone.softcap is not None:
        yield "a soft cap on logits" if backbone.softcap else "no soft cap on its logits"
    if backbone._scale != 1.0:
        yield "scaled states before its head"
    if backbone.family.logit_scale != 1.0 and not architecture.scales:
        yield "scaled logits"
    for layer in backbone.layers:
        unknown = [
            name
            for name, _ in layer.named_parameters()
            if name.rpartition(".")[0] not in architecture.layer
        ]
        if unknown:
            yield f"the tensor {unknown[0]!r}"


def _unfit_positions(backbone: Backbone, architecture: Architecture) -> Iterator[str]:
    config, width = backbone.text_config, head_width(backbone)
    for kind in dict.fromkeys(layer_kinds(backbone)):
        named = str(_rope(config, kind).get("rope_type", "default"))
        scaling = _of_rotary(backbone, kind, "attention_scaling")
        frequencies = inverse_frequencies(backbone, kind)
        if named in ("dynamic", "longrope") or scaling != 1.0:
            yield f"rotary positions of the type {named!r}"
        elif frequencies.numel() * 2 != width:
            yield "rotary positions on a part of each head"
        elif not architecture.rope_factors and (
            linear_factor(backbone, kind) is None
            or (kind == SLIDING and linear_factor(backbone, kind) != 1.0)
        ):
            yield f"rotary positions of the type {named!r}"
    if architecture.sections != ("mrope_section" in (config.rope_parameters or {})):
        yield "rotary positions on other axes"


def _unfit_attention(backbone: Backbone, architecture: Architecture) -> Iterator[str]:
    config, attention = backbone.text_config, backbone.layers[0].self_attn
    plain = abs(float(attention.scaling) - head_width(backbone) ** -0.5) < 1e-6
    if not (plain or architecture.query or architecture.scales):
        yield "attention scores of another scale"
    if getattr(config, "attn_logit_softcapping", None) and not architecture.softcaps:
        yield "a soft cap on attention scores"
    kinds = set(layer_kinds(backbone))
    undeclared = not getattr(config, "layer_types", None) and getattr(
        config, "sliding_window", None
    )
    if not architecture.windows and (kinds != {FULL} or undeclared):
        yield "sliding windows"
    elif kinds - {FULL, SLIDING}:
        yield f"layers of the kind {sorted(kinds - {FULL, SLIDING})[0]!r}"


def activation_of(config: Any) -> str | None:
    """Return what the feed-forward part of a decoder's layers has between its products."""
    names = ("hidden_activation", "hidden_act", "activation_function")
    return next((getattr(config, n) for n in names if getattr(config, n, None)), None)


def array_of(tensor: Tensor) -> Array:
    """Return a tensor as an array."""
    return np.asarray(tensor.detach().float().cpu().contiguous().numpy())


def layer_kinds(backbone: Backbone) -> list[str]:
    """Return for each layer whether it sees all, or through a window."""
    kinds = getattr(backbone.text_config, "layer_types", None)
    return list(kinds or [FULL] * backbone.depth)


def head_width(backbone: Backbone) -> int:
    """Width of one attention head."""
    config = backbone.text_config
    width = getattr(config, "head_dim", None)
    return int(width or backbone.width // config.num_attention_heads)


# -- rotary positions -------------------------------------------------------------------------


def _rope(config: Any, kind: str) -> dict[str, Any]:
    parameters = getattr(config, "rope_parameters", None) or {}
    return dict(parameters.get(kind, parameters))


def _of_rotary(backbone: Backbone, kind: str, name: str) -> Any:
    """An attribute of the rotary module: of a kind of layer, where each has its own."""
    rotary = backbone.stack.rotary_emb
    own = f"{kind}_{name}"
    return getattr(rotary, own if hasattr(rotary, own) else name)


def inverse_frequencies(backbone: Backbone, kind: str = FULL) -> Tensor:
    """Return by what each rotary pair [head width / 2] turns from one position to the next."""
    frequencies: Tensor = _of_rotary(backbone, kind, "inv_freq")
    return frequencies.float().cpu()


def rope_base(backbone: Backbone, kind: str = FULL) -> float:
    """The base of the rotary frequencies."""
    return float(_rope(backbone.text_config, kind).get("rope_theta", 10000.0))


def _factors(backbone: Backbone, kind: str) -> Tensor:
    used = inverse_frequencies(backbone, kind)
    width = 2 * used.numel()
    plain = rope_base(backbone, kind) ** -(torch.arange(0, width, 2, dtype=torch.float) / width)
    return plain / used


def rope_factors(backbone: Backbone) -> Tensor | None:
    """Return by how much each rotary frequency [head width / 2] is divided; None where all by
    one."""
    factors = _factors(backbone, FULL)
    return None if torch.allclose(factors, torch.ones_like(factors), rtol=1e-5) else factors


def linear_factor(backbone: Backbone, kind: str = FULL) -> float | None:
    """Return by how much all rotary frequencies are divided; None where not all by the same."""
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
    deepstack: after how many of them visual features are added.
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
    if architecture.scales:
        yield "attention.scale", float(backbone.layers[0].self_attn.scaling)
        yield "residual_scale", float(config.residual_multiplier)
        yield "logit_scale", 1.0 / backbone.family.logit_scale
    if architecture.softcaps:
        yield "attn_logit_softcapping", float(config.attn_logit_softcapping)
        yield "final_logit_softcapping", float(backbone.softcap or 0.0)
    if architecture.windows:
        kinds = layer_kinds(backbone)
        sliding = [kinds[layer] == SLIDING for layer in layers]
        yield from window_settings(architecture, sliding, config.sliding_window)
        if any(sliding):
            yield "rope.freq_base_swa", rope_base(backbone, SLIDING)


# -- a layer's tensors ------------------------------------------------------------------------


def layer_tensors(
    layer: nn.Module, architecture: Architecture, backbone: Backbone, layers: int
) -> Iterator[tuple[str, Array]]:
    """A decoder layer's tensors by their names in the file, less the layer's number.

    layers: in the file.
    """
    config = backbone.text_config
    heads = int(config.num_attention_heads)
    groups = int(getattr(config, "num_key_value_heads", heads))
    state = {name: array_of(tensor) for name, tensor in _float_state(layer).items()}
    try:
        found = layer_arrays(state, architecture, (heads, groups))
    except KeyError as error:
        raise _unfit(backbone, f"the tensor {error}") from error
    if architecture.query:
        own = own_scale(backbone.width, heads, head_width(backbone), architecture, layers)
        missing = np.float32(layer.self_attn.scaling / own)  # type: ignore[operator, union-attr]
        found[f"{architecture.query}.weight"] = found[f"{architecture.query}.weight"] * missing
    yield from found.items()


def _float_state(layer: nn.Module) -> dict[str, Tensor]:
    """The state of `layer`, as its float copy has it."""
    layer = gathered(layer)
    plain = layer if scheme(layer) is None else float_copy(layer, float_dtype(layer))
    return plain.state_dict()
