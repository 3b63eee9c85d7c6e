"""Linears with weights in 8 or 4 bits, read by torch's own kernels for a processor.

Only the weights are rounded; states are bfloat16, which the kernels are fast for (states in float32
take a path that is four times slower). What a token gets does not depend on the tokens beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from offramp.core.errors import InputError, check_known
from offramp.core.models.backbone import Backbone
from offramp.core.models.weights import OwnLinear, scheme
from offramp.features.quantized.attention import attend_by_token

_GROUP = 32
"""Columns that share a scale and a zero in 4 bits, and that kernels read at once: of other widths
the one for 8 bits reads past the end."""
_SHARES = (1.0, 0.95, 0.9, 0.85)
"""Shares of a group's range that 4 bits are tried on: to clip its ends may round the rest less."""
_TOGETHER = 2**16
"""Numbers that are rounded at once: what a core's cache holds."""


class QuantizedLinear(OwnLinear):
    """A linear layer whose weight is stored as codes and scales, from states [..., in] to [...,
    out].

    rows_together: rows that its kernel reads at once.
    """

    rows_together = 1
    weight: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features: int = linear.in_features
        self.out_features: int = linear.out_features
        self.bias: nn.Parameter = linear.bias

    @classmethod
    def fits(cls, linear: nn.Linear) -> bool:
        """Return True if a linear of these sizes can be stored in this form."""
        return linear.in_features % _GROUP == 0 and linear.out_features % cls.rows_together == 0

    def forward(self, states: Tensor) -> Tensor:
        rows = states.reshape(-1, self.in_features).to(torch.bfloat16)
        made = self.products(rows.contiguous()).to(states.dtype)
        made = made if self.bias is None else made + self.bias
        return made.view(*states.shape[:-1], self.out_features)

    def products(self, rows: Tensor) -> Tensor:
        """Return rows [N, in] times the weight: [N, out]; both in bfloat16."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Int8Linear(QuantizedLinear):
    """A linear layer in 8 bits, with a scale for each row."""

    word = "int8"

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight = linear.weight.float()
        scales = (weight.abs().amax(1).clamp(min=1e-8) / 127).bfloat16()
        codes = (weight / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.register_buffer("weight", codes)
        self.register_buffer("scales", scales)

    def products(self, rows: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(rows, self.weight, self.scales)


class Int4Linear(QuantizedLinear):
    """A linear layer in 4 bits, with a scale and a zero for every 32 columns of a row."""

    word = "int4"
    rows_together = 16
    codes: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        rows = torch.split(linear.weight, max(1, _TOGETHER // self.in_features))
        parts = [_in_4_bits(part.float().view(len(part), -1, _GROUP)) for part in rows]
        codes, scales, zeros = (torch.cat(of_parts) for of_parts in zip(*parts, strict=True))
        packed = torch._convert_weight_to_int4pack_for_cpu(codes.flatten(1), 1)
        self.register_buffer("codes", packed)
        scales_zeros = torch.stack((scales, zeros), -1).transpose(0, 1).contiguous()
        self.register_buffer("scales", scales_zeros)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The codes, in the type that transformers takes for a quantised weight."""
        return self.codes.view(torch.int8)

    def products(self, rows: Tensor) -> Tensor:
        return torch._weight_int4pack_mm_for_cpu(rows, self.codes, _GROUP, self.scales)


def _in_4_bits(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0..15 of a weight [out, G, 32], and the scales and zeros [out, G] in bfloat16 by which
    a code c means (c - 8) * scale + zero: those of the range with the least squared error."""
    low, high = groups.amin(-1), groups.amax(-1)

    def rounded(share: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        scales = ((high - low).clamp(min=1e-8) * share / 15).bfloat16()
        zeros = ((low + high + scales.float()) / 2).bfloat16()
        codes = (groups - zeros.float()[..., None]) / scales.float()[..., None] + 8
        return codes.round().clamp(0, 15).to(torch.int32), scales, zeros

    def error(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        meant = (codes - 8) * scales.float()[..., None] + zeros.float()[..., None]
        return (meant - groups).square().sum(-1)

    best = torch.stack([error(*rounded(share)) for share in _SHARES]).argmin(0)
    return rounded(torch.tensor(_SHARES, device=groups.device)[best])


SCHEMES: dict[str, type[QuantizedLinear]] = {kind.word: kind for kind in (Int8Linear, Int4Linear)}
"""Schemes by the word that `quantize=` and --quantize take."""


def check_quantize(word: str, dtype: torch.dtype | str) -> None:
    """Raise `InputError` for an unknown scheme, or one that does not fit the precision `dtype`."""
    check_known("Quantisation", [word], tuple(SCHEMES))
    if str(dtype).removeprefix("torch.") not in ("auto", "bfloat16"):
        raise InputError(
            f"Weights in {word} are read with states in bfloat16, and {dtype} was asked for.",
            "Leave the precision out, or the quantisation.",
        )


def quantized(backbone: Backbone, word: str) -> Backbone:
    """Round the weights of the decoder's layers in place, and return the resulting backbone.

    word: a scheme of `SCHEMES`. The backbone is in bfloat16.

    Raises:
        InputError: it is quantised already, in another precision, or its layers do not fit.
    """
    check_quantize(word, backbone.dtype)
    if (held_in := scheme(backbone.model)) is not None:
        raise InputError(
            f"{backbone.name} is quantised already, in {held_in}, and was to be in {word}.",
            "Leave the quantisation out, or name the model that it was made of.",
        )
    backbone.check_whole(f"quantize={word!r}")
    quantize_layers(backbone.layers, word)
    kept = {name: getattr(backbone, name) for name in ("name", "revision", "example")}
    return Backbone(backbone.model, **kept)


@torch.no_grad()
def quantize_layers(layers: nn.Module, word: str) -> None:
    """Round decoder layers' weights, and compute several tokens as each would be computed alone.

    Plain linears are replaced one after the other, so that at most one weight is held twice.
    Linears whose sizes do not fit the scheme stay as they are.

    Raises:
        InputError: none fits, or they are not on a CPU.
    """
    kind = SCHEMES[word]
    places = [
        (parent, name, part)
        for parent in layers.modules()
        for name, part in parent.named_children()
        if type(part) is nn.Linear and kind.fits(part)
    ]
    if not places:
        raise InputError(
            f"No linear of the decoder can be held in {word}: that takes widths that {_GROUP} "
            f"divides, and rows that {kind.rows_together} does.",
            "Leave the quantisation out, or use a model with such widths.",
        )
    if any(part.weight.device.type != "cpu" for _, _, part in places):
        raise InputError(
            f"Weights in {word} are read by a processor's kernels, and the model is elsewhere.",
            "Load it with device='cpu', or quantise with bitsandbytes or torchao; "
            "docs/quantisation.md shows how.",
        )
    while places:
        parent, name, linear = places.pop()
        setattr(parent, name, kind(linear))
    attend_by_token(layers)
