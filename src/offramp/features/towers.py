"""Engines that run a vision tower in place of PyTorch, by name."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from offramp.core.errors import InputError, did_you_mean
from offramp.core.models.backbone import Backbone
from offramp.core.models.stand_in import TORCH

ENGINES = dict.fromkeys(
    ("onnxruntime", "openvino", "openvino-bf16", "onnxruntime-int8"),
    "offramp.features.vision_engine",
)
"""By the name of an engine for vision towers, its module, which has `check_vision_engine(name)` and
`vision_engine(name, model, path, example)`: what stands at the path then, or None."""


def tower_engine(name: str) -> Any:
    """Return the module of an engine of `ENGINES` whose packages are installed; None for "torch".

    Raises:
        InputError: there is no such engine, or a package that it needs is missing.
    """
    if name == TORCH:
        return None
    if name not in ENGINES:
        raise InputError(
            f"There is no vision engine {name!r}.", did_you_mean(name, (TORCH, *ENGINES))
        )
    module = import_module(ENGINES[name])
    module.check_vision_engine(name)
    return module


def with_vision(
    backbone: Backbone, name: str, example: Mapping[str, Any] | None = None
) -> Backbone:
    """Return the same model with its vision tower in an inference engine, on a CPU in float32.

    name: "onnxruntime", "openvino", "openvino-bf16" or "onnxruntime-int8" (the last two round);
    "torch": the model's own tower. example: the processor's output for a prompt with an image, with
    which the tower is exported.

    Where the export fails, or the engine's features differ from the tower's, PyTorch goes on with a
    warning.

    Raises:
        InputError: there is no such engine, its package is missing, or there is no tower on a CPU.
    """
    engine = tower_engine(name)
    if engine is None:
        return backbone.with_tower(None)
    backbone.check_whole(f"A vision tower in {name}")
    if backbone.text_only:
        raise InputError(
            f"{backbone.name} sees no images, and has no vision tower to run in {name}.",
            "Leave the vision engine out.",
        )
    if backbone.device.type != "cpu":
        raise InputError(
            f"{name} runs vision towers on a CPU, and the model is on {backbone.device}.",
            "Leave the vision engine out, or load the model with device='cpu'.",
        )
    plain = backbone.with_tower(None)
    assert plain.vision is not None  # or it says what to do
    path = str(backbone.family.vision)
    return plain.with_tower(engine.vision_engine(name, backbone.model, path, example))
