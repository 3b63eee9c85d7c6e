"""A tiny model's checkpoint in the forms of weights that people serve, written by hand as their
libraries lay them out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Made = tuple[dict[str, Tensor], Tensor]
"""Tensors by the ends of their names, and the floats that they mean [out, in]."""


def int8(weight: Tensor) -> Made:
    scale = weight.abs().amax(1, keepdim=True) / 127
    rounded = (weight / scale).round().clamp(-128, 127)
    return {"weight": rounded.to(torch.int8), "weight_scale": scale}, rounded * scale


def fp8(weight: Tensor) -> Made:
    scale = weight.abs().amax(1, keepdim=True) / 448
    rounded = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": rounded, "weight_scale": scale}, rounded.float() * scale


def _int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values 0 to 15 [out, in] around 8, scales [out, groups], and what they mean."""
    rows, columns = weight.shape
    grouped = weight.view(rows, columns // GROUP, GROUP)
    scale = grouped.abs().amax(2) / 7
    values = ((grouped / scale[..., None]).round() + 8).clamp(0, 15)
    meant = ((values - 8) * scale[..., None]).view(rows, columns)
    return values.view(rows, columns).int(), scale, meant


def _packed(values: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight values of 4 bits in each int32, along the last axis."""
    parts = values.reshape(*values.shape[:-1], -1, 8)
    made = torch.zeros(parts.shape[:-1], dtype=torch.int64)
    for place, at in enumerate(order):
        made |= parts[..., at].long() << (4 * place)
    return torch.where(made >= 2**31, made - 2**32, made).int()


def int4(weight: Tensor) -> Made:
    values, scale, meant = _int4(weight)
    shape = torch.tensor(weight.shape)
    return {"weight_packed": _packed(values), "weight_scale": scale, "weight_shape": shape}, meant


def awq(weight: Tensor) -> Made:
    values, scale, meant = _int4(weight)
    zeros = torch.full((scale.shape[1], weight.shape[0]), 8)
    return {
        "qweight": _packed(values.T.contiguous(), AWQ_ORDER),
        "qzeros": _packed(zeros, AWQ_ORDER),
        "scales": scale.T.contiguous(),
    }, meant


def gptq(weight: Tensor) -> Made:
    values, scale, meant = _int4(weight)
    zeros = torch.full((scale.shape[1], weight.shape[0]), 7)  # one less, as GPTQ stores it
    return {
        "qweight": _packed(values).T.contiguous(),
        "qzeros": _packed(zeros),
        "scales": scale.T.contiguous(),
        "g_idx": torch.arange(weight.shape[1]).int() // GROUP,
    }, meant


def _compressed(form: str, bits: int, kind: str, acts: bool, group: int | None) -> dict[str, Any]:
    strategy = (
        {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    )
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": False, **strategy}
    inputs = {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "dynamic": True,
        "strategy": "token",
    }
    each = {"targets": ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {**each, "input_activations": inputs if acts else None}},
    }


FOUR = {"bits": 4, "group_size": GROUP}
FORMS: Mapping[str, tuple[Callable[[Tensor], Made], dict[str, Any]]] = {
    "int8": (int8, _compressed("int-quantized", 8, "int", True, None)),
    "fp8": (fp8, _compressed("float-quantized", 8, "float", True, None)),
    "int4": (int4, _compressed("pack-quantized", 4, "int", False, GROUP)),
    "awq": (awq, {"quant_method": "awq", "version": "gemm", "zero_point": True, **FOUR}),
    "gptq": (gptq, {"quant_method": "gptq", "desc_act": False, "sym": True, **FOUR}),
}


def quantise(model: Path, form: str, out: Path) -> Path:
    """Write a checkpoint whose layers' products are in a form."""
    from safetensors.torch import load_file, save_file

    make, said = FORMS[form]
    shutil.copytree(model, out)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        if ".layers." in name and name.endswith("proj.weight"):
            stem = name.removesuffix("weight")
            tensors |= {stem + end: part.contiguous() for end, part in make(tensor)[0].items()}
        else:
            tensors[name] = tensor
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    return out
