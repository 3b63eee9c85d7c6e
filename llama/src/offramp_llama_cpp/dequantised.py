"""A backbone with the weights of a GGUF format: what its exits are to agree with inside llama.cpp.

Formats of four bits change a model's answers, and an exit that learnt from the model as it was
drafts worse for them. Exits learn from the rounded one instead: it writes the answers, and the
states that they learn from are its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from offramp.core.errors import InputError
from offramp.core.models.backbone import Backbone
from offramp.core.models.weights import scheme
from offramp_llama_cpp.architectures import architecture_of, array_of
from offramp_llama_cpp.gguf_export import ExportFormats
from offramp_llama_cpp.gguf_writing import rounded


class Dequantised(AbstractContextManager["Dequantised"]):
    """While it is entered, a backbone computes with the weights that `export_gguf` writes of it.

    Those of the layers, and the head's, where it reads states: embeddings, which stay in PyTorch,
    norms, biases and routers are as they are. Where a file's weights are the model's times some
    factor, as of OPT and Gemma, values can differ by the rounding of a block's scale.

    It can be entered again and again, also while it is entered, but not while another is that
    swaps the same weights; both sets of weights are in memory.

    name: the layers' format.
    """

    def __init__(self, backbone: Backbone, formats: ExportFormats | str) -> None:
        """Round the weights; the backbone stays as it is.

        Raises:
            InputError: an unknown format, weights that are quantised already, or no package gguf.
            UnsupportedBackboneError: llama.cpp does not run this decoder.
        """
        formats = ExportFormats(formats) if isinstance(formats, str) else formats
        backbone.check_whole("Rounding")
        if (held := scheme(backbone.model)) is not None:
            raise InputError(
                f"Weights in {held} are not rounded once more, to {formats.layers}.",
                "Load the model without quantisation.",
            )
        self.name: str = formats.layers
        self._head = backbone.head
        self._layers = {weight: _rounded(weight, formats.layers) for weight in _matrices(backbone)}
        weight = _rounded(backbone.head.weight, formats.head)
        # Of its own: embeddings that are tied to the head stay as they are.
        self._other = nn.Parameter(weight, requires_grad=False)
        self._own, self._entered = backbone.head.weight, 0

    def __enter__(self) -> Dequantised:
        """Raises `InputError` where another one is entered."""
        if not self._entered:
            if self._head.weight is not self._own:
                raise InputError(
                    f"The backbone computes with other weights than {self.name} was rounded from.",
                    "Leave one `Dequantised` before another is made and entered.",
                )
            self._swap()
        self._entered += 1
        return self

    def __exit__(self, *_: Any) -> None:
        self._entered -= 1
        if not self._entered:
            self._swap()

    def _swap(self) -> None:
        for weight, other in self._layers.items():
            weight.data, self._layers[weight] = other, weight.data
        self._head.weight, self._other = self._other, self._head.weight


def _matrices(backbone: Backbone) -> Iterator[nn.Parameter]:
    """The layers' weights that a file holds in the layers' format."""
    names = architecture_of(backbone).layer
    for layer in backbone.layers:
        for name, weight in layer.named_parameters():
            if weight.dim() > 1 and names[name.rpartition(".")[0]] != "ffn_gate_inp":
                yield weight


def _rounded(weight: Tensor, kind: str) -> Tensor:
    return torch.from_numpy(rounded(array_of(weight), kind)).to(weight)
