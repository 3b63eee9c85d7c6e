"""Engines that run a vision tower in place of PyTorch, by name."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import nn

from offramp.errors import InputError, did_you_mean

TORCH = "torch"
ENGINES = dict.fromkeys(
    ("onnxruntime", "openvino", "openvino-bf16", "onnxruntime-int8"), "offramp.models.vision_engine"
)
"""By the name of an engine for vision towers, its module, which has `check_vision_engine(name)` and
`vision_engine(name, model, path, example)`: what stands at the path then, or None."""


class StandIn(nn.Module):
    """Stands where a vision tower stood. Thread-safe.

    name: of what runs the tower. tower: the model's own. beside: what stands in the places of other
    modules then, by their paths from the model.
    """

    name: str
    tower: nn.Module
    beside: Mapping[str, nn.Module]

    def __init__(
        self, name: str, tower: nn.Module, beside: Mapping[str, nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.name, self.tower = name, tower
        self.__dict__["beside"] = beside or {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("tower"), name)


def tower_engine(name: str) -> Any:
    """Return the module of an engine of `ENGINES`, whose packages are there; None for "torch".

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
