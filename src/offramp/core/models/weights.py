"""Weights of quantised linears as floats: an exit beside them is a float copy, which can be trained
and saved, and a fingerprint is taken of the values that the backbone computes with.

The backbone stays as it is. A scheme need not be known here: what its linear makes of unit vectors
is its weight. That is also the safer way: bitsandbytes lays 4-bit weights out anew when they first
run on a processor, and its own function then reads them wrongly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from offramp.core.errors import UnsupportedBackboneError
from offramp.core.models.sharding import full, gathered, hooks_of, loaded, local, unhook

_BITS = ("bits", "num_bits", "qtype", "target_dtype", "quant_type")
"""Where linears and their weights say how many bits they are held in."""
_NEAR = 0.05
"""How far a linear may be from its weight, relative to the largest value: schemes that round what
comes in as well are that close."""
_LARGE = 2.0
"""Of a state that is looked at: below the 6 from which bitsandbytes calls a value an outlier."""
_COMPRESSED = "quantization_scheme"
"""What compressed-tensors leaves in a linear, which rounds its weight whenever it runs."""


class OwnLinear(nn.Module):
    """The base of linears that hold a weight in another form, and compute each token by itself.

    word: name of the form; "" where its numbers are the plain linear's.
    """

    word: str = ""

    def dense(self) -> Tensor:
        """Return the weight [out, in], if its numbers are the plain linear's."""
        raise NotImplementedError


def check_scheme(model: Any) -> None:
    """Raise `UnsupportedBackboneError` where transformers does not know the quantisation scheme
    that a model's configuration names: it would leave the quantised weights as initialised."""
    config = getattr(model.config, "quantization_config", None)
    if config is None or getattr(model, "hf_quantizer", None) is not None or scheme(model):
        return
    known = getattr(config, "quant_method", None) or dict(config).get("quant_method")
    raise UnsupportedBackboneError(
        f"{type(model).__name__} is quantised by {str(known)[:60]!r}, which this transformers does "
        "not know: its weights were not read.",
        "Update transformers, or load the model in a scheme that docs/quantisation.md names.",
    )


def unpack(model: Any) -> None:
    """Unpack weights that compressed-tensors would unpack at the model's first run, which twins
    bypass."""
    if hasattr(model, "ct_decompress_hook"):
        model.hf_quantizer.compressor.decompress_model(model)


def is_quantized(module: nn.Module) -> bool:
    """Return True if this module is a quantised linear layer: a leaf whose weight is no plain float
    tensor, in whatever layout."""
    if not hasattr(module, "in_features") or any(True for _ in module.children()):
        return False
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        return not _is_plain(weight) or hasattr(module, _COMPRESSED)
    return any(True for _ in chain(module.parameters(), module.buffers()))


def _is_plain(tensor: Tensor) -> bool:
    """Whether the tensor holds its values as they are: floats of 8 bits have a scale besides."""
    tensor = local(tensor)
    known = tensor.is_floating_point() and tensor.itemsize > 1 and not tensor.is_mkldnn
    return known and type(tensor) in (Tensor, nn.Parameter)


def scheme(module: nn.Module) -> str | None:
    """Return the quantisation scheme in words, with its bits: our own, or the class of the first
    quantised linear or of its weight; None: nothing is quantised."""
    for part in module.modules():
        if isinstance(part, OwnLinear):
            if part.word:
                return part.word
        elif is_quantized(part):
            weight = getattr(part, "weight", None)
            holder: Any = weight if type(part) is nn.Linear else part
            holder = getattr(part, _COMPRESSED, holder)
            places = (part, weight, getattr(holder, "weights", None))
            named = (getattr(at, name, None) for at in places for name in _BITS)
            return " ".join(
                [type(holder).__name__, *dict.fromkeys(map(_word, filter(None, named)))]
            )
    return None


def _word(bits: Any) -> str:
    return str(getattr(bits, "name", bits)).removeprefix("torch.")


@torch.no_grad()
def rounds_states(module: nn.Module) -> str | None:
    """Return the scheme in `module` that rounds the states which enter it, as bitsandbytes' 8 bits
    and what torchao calls dynamic do; None where none does.

    A difference in the last bit, as of a call of more tokens, then becomes a step of 8 bits.
    """
    dtype, first = float_dtype(module), dict[str | None, nn.Module]()
    for part in module.modules():
        if is_quantized(part) and not isinstance(part, OwnLinear):
            first.setdefault(scheme(part), part)
    return next((name for name, linear in first.items() if _rounds(linear, dtype)), None)


def _rounds(linear: Any, dtype: torch.dtype) -> bool:
    """Whether a change of a state that is less than half a step of its largest value is lost."""
    like = next(chain(linear.parameters(), linear.buffers()))
    if like.device.type == "meta":
        return False

    def of(first: float, others: float) -> Tensor:
        state = torch.full((1, linear.in_features), others, device=like.device)
        state[0, 0] = first
        made: Tensor = linear(state.to(dtype))
        return made.float()

    try:
        of_whole_numbers, of_floats = (_LARGE, 0.0, 0.4 * _LARGE / 127), (1.0, 1.0, -0.02)
        lost = [
            (of(first, others + more) - of(first, others) - change).norm() / change.norm()
            for first, others, more in (of_whole_numbers, of_floats)
            for change in [of(0.0, more) - of(0.0, 0.0)]
        ]
    except Exception:  # whatever its kernels raise: the model itself runs before it is used
        return False
    return max(map(float, lost)) > 0.5


@torch.no_grad()
def dequantized(linear: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weight [out, in] that a quantised linear computes with.

    dtype: of the incoming states.

    Raises:
        UnsupportedBackboneError: it cannot be read.
    """
    if isinstance(linear, OwnLinear) and not linear.word:
        return linear.dense()
    weight = getattr(linear, "weight", None)
    if weight is not None and type(weight).dequantize is not Tensor.dequantize:
        return weight.dequantize()  # type: ignore[no-any-return]
    return _by_unit_vectors(linear, dtype)


def _by_unit_vectors(linear: Any, dtype: torch.dtype) -> Tensor:
    """The weight, read off by unit vectors and checked on another vector."""
    weight: Tensor
    device = next(chain(linear.parameters(), linear.buffers())).device
    units = torch.eye(linear.in_features, device=device).to(dtype)
    other = torch.linspace(-1, 1, linear.in_features, device=device).to(dtype)[None]
    try:
        bias = linear(torch.zeros_like(other))
        weight = (linear(units) - bias).T
        ours, theirs = other @ weight.T + bias, linear(other)
    except Exception as error:  # whatever its kernels raise
        raise _unreadable(linear, f"{type(error).__name__}: {str(error)[:120]}") from error
    if not bool(((ours - theirs).abs().max() <= _NEAR * theirs.abs().max()).item()):
        raise _unreadable(linear, "what it makes of states is not linear in them")
    return weight


def _unreadable(module: nn.Module, why: str) -> UnsupportedBackboneError:
    return UnsupportedBackboneError(
        f"Weights of {type(module).__name__} cannot be read as floats ({why}).",
        "Load the model in a scheme that docs/quantisation.md names, or in float.",
    )


def float_copy(
    layer: nn.Module, dtype: torch.dtype, instead: Mapping[nn.Module, nn.Module] | None = None
) -> nn.Module:
    """Return a deep copy with plain linears of the same values, in `dtype`, for quantised ones;
    where processes split the layer, of its full tensors.

    instead: replacements in the copy, for modules of the layer.

    Raises:
        UnsupportedBackboneError: weights that are quantised elsewhere than in linears.
    """
    layer = gathered(layer)
    with loaded(layer):
        memo: dict[int, Any] = {id(part): other for part, other in (instead or {}).items()}
        left_out = {id(part) for block in instead or {} for part in block.modules()}
        for part in layer.modules():
            if id(part) not in left_out and is_quantized(part):
                memo[id(part)] = _plain(part, dtype)
        made = copy.deepcopy(layer, memo | hooks_of(layer))
    unhook(made)
    for part in made.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not _is_plain(parameter):
                raise _unreadable(part, f"its {name} is {parameter.dtype}, and it is no linear")
    return made


def _plain(linear: Any, dtype: torch.dtype) -> nn.Linear:
    bias = getattr(linear, "bias", None)
    made = nn.Linear(linear.in_features, linear.out_features, bias=bias is not None, device="meta")
    made.weight = nn.Parameter(dequantized(linear, dtype).detach().to(dtype, copy=True))
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().to(dtype, copy=True))
    return made


def float_parameters(
    module: nn.Module, besides: Collection[int] = ()
) -> list[Callable[[], Tensor]]:
    """Return functions that make the parameters as floats, in the order of `module.parameters()`.

    Each parameter is made when its function is called, because all at once may not fit in memory. A
    split parameter is made whole.

    besides: ids of parameters and modules that are left out.
    """
    return [make for _, make in named_float_parameters(module, besides)]


def named_float_parameters(
    module: nn.Module, besides: Collection[int] = ()
) -> list[tuple[str, Callable[[], Tensor]]]:
    """Return the functions of `float_parameters` with the parameters' names in the module."""
    seen, dtype = set(besides), float_dtype(module)
    makes: list[tuple[str, Callable[[], Tensor]]] = []
    for at, part in module.named_modules():
        start = f"{at}." if at else ""
        if is_quantized(part):
            if id(part) in seen:
                continue
            read = partial(dequantized, part, dtype)
            makes.append((f"{start}weight", partial(_made, part, read)))
        for name, parameter in held_plainly(part).items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                makes.append((start + name, partial(_made, part, partial(getattr, part, name))))
    return makes


def held_plainly(part: nn.Module) -> Mapping[str, Tensor | None]:
    """Return a module's own parameters by name; of a quantised linear all but its weight."""
    return {"bias": getattr(part, "bias", None)} if is_quantized(part) else part._parameters


def _made(part: nn.Module, make: Callable[[], Tensor]) -> Tensor:
    with loaded(part):
        return full(make().detach())


def float_dtype(module: nn.Module) -> torch.dtype:
    """Return the precision of the states: that of a norm, which no scheme quantises."""
    first: torch.dtype | None = None
    for parameter in filter(_is_plain, module.parameters()):
        if parameter.dim() == 1:
            return parameter.dtype
        first = first or parameter.dtype
    return first or torch.float32
