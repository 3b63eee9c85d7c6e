"""The decoder graphs of llama.cpp that exits run in, and how a layer's tensors are called there.

Nothing here needs PyTorch: a file from the hub is cut, and fed, without it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

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
FULL, SLIDING = "full_attention", "sliding_attention"

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
    deepstack: visual features are added after the first layers.
    ahead: prompts may hold parts whose tokens see each other, ahead too.
    windows: layers may look back through a window. always_windows: the graph asks for one.
    query: the tensor that makes up for the scale of attention scores, which llama.cpp computes by
    itself: 1 / sqrt(head width), or 1 / sqrt(width / heads) in a file of `large` layers.
    scales: the graph takes those of scores, residuals and logits. softcaps: of scores and logits.
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
    scales: bool = False
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
    "gemma3",
    {**_FOUR_NORMS, **_HEAD_NORMS},
    activations=_GELU,
    norm_offset=1.0,
    free_width=True,
    ahead=True,
    windows=True,
    query="attn_q_norm",
    large=62,
)
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
        "gemma",
        _LAYER,
        activations=_GELU,
        norm_offset=1.0,
        free_width=True,
        ahead=True,
        divided=True,
    ),
    "gemma2": Architecture(
        "gemma2",
        _FOUR_NORMS,
        activations=_GELU,
        norm_offset=1.0,
        free_width=True,
        ahead=True,
        windows=True,
        always_windows=True,
        query="attn_q",
        large=46,
        softcaps=True,
        divided=True,
    ),
    "gemma3_text": _GEMMA3,
    "granite": Architecture(
        "granite", _LAYER, interleaved=True, free_width=True, rope_factors=True, scales=True
    ),
    "opt": Architecture("gpt2", _OPT, activations=("relu",), state_scale=_OPT_SCALE),
}
"""By the `model_type` of the text config."""


GRAPHS: dict[str, Architecture] = {
    **{each.name: each for each in ARCHITECTURES.values()},
    "qwen2vl": replace(_QWEN_VL, name="qwen2vl"),
}
"""By `general.architecture`, as a file from the hub says it."""


DRAFTS = "drafts."
"""How names of tensors begin, of an exit that drafts on, that are not its layer's."""


def window_settings(
    graph: Architecture, sliding: list[bool], window: int | None
) -> Iterator[tuple[str, Any]]:
    """Metadata: of each layer of a file, whether it looks back through a window, and how long that
    is; None: it is not known."""
    if any(sliding) and window is not None:
        yield "attention.sliding_window", int(window)
        yield "attention.sliding_window_pattern", sliding
    elif graph.always_windows:  # a file without a window would abort the process
        yield "attention.sliding_window", NO_WINDOW
        yield "attention.sliding_window_pattern", [True] * len(sliding)


def layer_arrays(
    state: Mapping[str, Array], architecture: Architecture, heads: tuple[int, int]
) -> dict[str, Array]:
    """A decoder layer's tensors by their names in a file, less the layer's number.

    state: by their names in Hugging Face's module; what enters an exit that drafts on is left out.
    heads: of queries, and of keys and values.

    Raises:
        KeyError: a tensor that has no place in the graph, by its name.
    """
    found: dict[str, Array] = {}
    by_stem = dict(zip(("attn_q", "attn_k"), heads, strict=True))
    for name, value in state.items():
        if name.startswith(DRAFTS):
            continue
        module, _, part = name.rpartition(".")
        stem = architecture.layer.get(module)
        if stem is None:
            raise KeyError(name)
        array = np.asarray(value, dtype=np.float32)
        if stem == "experts":
            found.update(_experts(part, array))
            continue
        if architecture.interleaved and stem in by_stem:
            array = _interleave(array, by_stem[stem])
        if stem.endswith("norm") and part == "weight":
            array = array + np.float32(architecture.norm_offset)
        found[f"{stem}.{part}"] = array
    if architecture.state_scale != 1.0:
        _scale_states(found, np.float32(architecture.state_scale))
        for part in ("weight", "bias"):
            fused = [found.pop(f"attn_{name}.{part}") for name in "qkv"]
            found[f"attn_qkv.{part}"] = np.concatenate(fused)
    return found


def _experts(part: str, array: Array) -> Iterator[tuple[str, Array]]:
    """The weights of all experts in one tensor [experts, rows, columns]."""
    if part == "gate_up_proj":
        gate, up = np.split(array, 2, axis=1)
        yield "ffn_gate_exps.weight", gate
        yield "ffn_up_exps.weight", up
    else:
        yield "ffn_down_exps.weight", array


def _scale_states(found: dict[str, Array], scale: np.float32) -> None:
    """Have a layer take and give states that are `scale` times as large.

    `ffn_down` stays: what it is given is larger by that already.
    """
    for name in (
        "attn_output.weight",
        "attn_output.bias",
        "ffn_up.weight",
        "ffn_up.bias",
        "ffn_down.bias",
    ):
        found[name] = found[name] * scale


def _interleave(array: Array, heads: int) -> Array:
    """Rows [heads * width, ...] of a query or key projection, so that the two of each rotary pair,
    which in Hugging Face stand half a head apart, become neighbours."""
    rows = array.reshape(heads, 2, -1, *array.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(array.shape)


def own_scale(
    width: int, heads: int, head_width: int, architecture: Architecture, layers: int
) -> float:
    """The scale of attention scores that llama.cpp computes by itself for a file of `layers`."""
    base = width // heads if layers == architecture.large else head_width
    return 1.0 / math.sqrt(base)
