"""A decoder's own forward, run in parts.

Every decoder of vLLM's that can run pipeline-parallel has `start_layer` and `end_layer`, asks
`get_pp_group()` whether it is the first or the last rank, and hands `IntermediateTensors` on. Here
one rank plays several: layers [0, d), an exit with the model's own norm, and layers [d, L) for the
rows that stay. What the model does between its layers (fused norms, scaled embeddings) stays its
own code.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from offramp_vllm.compiled import Compiled, Part
from offramp_vllm.refuse import Refused


class _Rank:
    """The pipeline's group as a rank of it would see it."""

    def __init__(self, group: Any, first: bool, last: bool) -> None:
        self._group, self.is_first_rank, self.is_last_rank = group, first, last

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)


@contextmanager
def _rank(first: bool, last: bool) -> Iterator[None]:
    from vllm.distributed import parallel_state

    group = parallel_state._PP
    parallel_state._PP = _Rank(group, first, last)  # type: ignore[assignment]
    try:
        yield
    finally:
        parallel_state._PP = group


def decoder_of(model: nn.Module, layers: int) -> nn.Module:
    """The module of a model whose forward loops over so many layers.

    Raises:
        Refused: the model does not keep vLLM's pipeline contract, or not for one decoder alone.
    """
    found = [
        module
        for module in model.modules()
        if hasattr(module, "start_layer") and getattr(module, "end_layer", None) == layers
    ]
    # A class that wraps the decoder may show the same two numbers; the loop is in the innermost.
    inner = [m for m in found if not any(o is not m and o in set(m.modules()) for o in found)]
    if len(inner) != 1:
        raise Refused(
            f"{type(model).__name__} has {len(inner)} decoders that can run in parts.",
            "Serve it without exits: its class in vLLM has no pipeline parallel.",
        )
    return inner[0]


def layers_of(decoder: nn.Module) -> nn.ModuleList:
    """The decoder's layers, exits included."""
    for child in decoder.children():
        if isinstance(child, nn.ModuleList) and len(child) == decoder.end_layer:
            return child
    raise Refused(
        f"{type(decoder).__name__} does not keep its layers in one list.", "Serve it without exits."
    )


class Stages:
    """Parts of a decoder.

    L layers of the backbone come first, then the exits. compiled: parts that are compiled; None:
    all run eagerly.
    """

    compiled: Compiled | None = None

    def __init__(self, decoder: nn.Module) -> None:
        self._decoder, self._forward = decoder, decoder.forward
        self._whole = (decoder.start_layer, decoder.end_layer)
        self.names = tuple(inspect.signature(decoder.forward).parameters)[:4]

    def arguments(self, *args: Any, **kw: Any) -> tuple[dict[str, Any], Tensor]:
        """What a call of the decoder was given, by name, and its positions [T] or [3, T]."""
        given = {**dict(zip(self.names, args, strict=False)), **kw}
        return given, given[self.names[1]]

    def tokens(self, ids: Tensor, positions: Tensor) -> dict[str, Any]:
        """What a call over tokens [T] alone is given, by name."""
        return dict(zip(self.names, (ids, positions, None, None), strict=True))

    def begin(self, given: Mapping[str, Any], end: int) -> dict[str, Tensor]:
        """Layers [0, end) from tokens or embeddings."""
        return dict(self._run(dict(given), 0, end, last=False).tensors)

    def between(
        self,
        state: Mapping[str, Tensor],
        positions: Tensor,
        start: int,
        end: int,
        *,
        eager: bool = False,
    ) -> dict[str, Tensor]:
        """Layers [start, end) from a state. eager: not by compiled code."""
        given = self._given(state, positions)
        return dict(self._run(given, start, end, last=False, eager=eager).tensors)

    def finish(
        self, state: Mapping[str, Tensor], positions: Tensor, start: int, end: int
    ) -> Tensor:
        """Layers [start, end) from a state, and the model's final norm [T, D]."""
        return self._run(self._given(state, positions), start, end, last=True)  # type: ignore[no-any-return]

    def _given(self, state: Mapping[str, Tensor], positions: Tensor) -> dict[str, Any]:
        from vllm.sequence import IntermediateTensors

        values = (None, positions, IntermediateTensors(dict(state)), None)
        return dict(zip(self.names, values, strict=True))

    def _run(
        self, given: dict[str, Any], start: int, end: int, *, last: bool, eager: bool = False
    ) -> Any:
        state, embeds = self.names[2:]
        first = start == 0 and given.get(state) is None
        part = Part(start, end, first, last, given.get(embeds) is not None)
        if not eager and self.compiled is not None and part in self.compiled:
            with _rank(first, last):
                return self.compiled.run(part, given)
        numbers = self._decoder.__dict__  # setting attributes of a module is slow
        numbers["start_layer"], numbers["end_layer"] = start, end
        try:
            with _rank(first, last):
                return self._forward(**given)
        finally:
            numbers["start_layer"], numbers["end_layer"] = self._whole


def states_like(model: Any, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """A state of one token between two layers, of zeros, as the model's own stages hand it on."""
    name = "make_empty_intermediate_tensors"
    makes = next(getattr(module, name) for module in model.modules() if hasattr(module, name))
    return dict(makes(1, dtype, device).tensors)
