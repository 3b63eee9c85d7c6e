"""The decoder as CUDA graphs, one answer at a time."""

from __future__ import annotations

from typing import Any

from offramp.core.errors import InputError
from offramp.engines import register_engine


def open(model: Any, *, context: int = 2048, **_: Any) -> Any:
    """A runtime in the adapter's place.

    Raises:
        InputError: the model is on no NVIDIA GPU.
    """
    if model.backbone.device.type != "cuda":
        raise InputError(
            f"CUDA graphs need an NVIDIA GPU, and the model is on {model.backbone.device}.",
            "Leave --engine out, or name the GPU with --device cuda.",
        )
    from offramp_lab.graphs.runtime import GraphRuntime

    return GraphRuntime(model, context=context)


register_engine("cuda-graphs", open, "needs a GPU", replaces=True)
