"""Decoder layers and exits by `torch.compile`, each on its own, so that exits stay where they are.

With the weights frozen into the code a layer over one token takes about 0.7 of its eager time on a
CPU, and a layer takes some five seconds to compile. What decoding does with the layers is not
compiled: the decisions which of them run stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from offramp.models.backbone import Backbone
from offramp.models.exits import Exits, ExitSet

log = logging.getLogger(__name__)

FREEZING: dict[str, Any] = {"freezing": True}


@contextmanager
def compiled(
    backbone: Backbone, exits: ExitSet | Exits | None = None, *, backend: str = "inductor"
) -> Iterator[bool]:
    """Compile for as long as the context lasts; yields whether it could be done.

    Without a C++ compiler on a CPU it warns, and nothing is compiled. The first tokens are slow,
    while the code is made; new lengths of a batch or of a chunk are compiled once more. For
    decoding only: the weights must not change meanwhile, and hooks set after the first call may not
    be seen.
    """
    reason = _missing(backbone) if backend == "inductor" else None
    if reason is not None:
        log.warning("Decoding is not compiled: %s", reason)
        yield False
        return
    import torch._dynamo

    own = () if exits is None else ExitSet.of(exits).modules.values()
    layers: list[nn.Module] = [*backbone.layers, *own]
    options = FREEZING if backend == "inductor" else None
    # All layers are one piece of code to the compiler, and each with each kind of call counts.
    limit = max(torch._dynamo.config.recompile_limit, 8 * len(layers))
    with torch._dynamo.config.patch(recompile_limit=limit, accumulated_recompile_limit=4 * limit):
        for layer in layers:
            layer.compile(dynamic=True, backend=backend, options=options)
        try:
            yield True
        finally:
            for layer in layers:
                layer._compiled_call_impl = None


def _missing(backbone: Backbone) -> str | None:
    """Why inductor cannot make code for this device; None where it can."""
    if backbone.device.type != "cpu":
        return None
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # what a missing compiler raises differs between releases
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None
