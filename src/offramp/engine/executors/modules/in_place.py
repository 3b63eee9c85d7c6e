"""What decoding calls in the place of layers, exits and the LM head: bare twins, or machine code.

Bare: `nn.Module` looks for hooks at each call, and for parts by a detour through `__getattr__`. A
decoder layer has a dozen modules, and for one token that is a quarter of its Python. Where there
are no hooks, a twin that shares every parameter, whose call is its `forward` and whose parts are
plain attributes, computes the same, bit for bit, without.

Code is for the few tokens that decoding reads at a time. It is compiled when a module is first
called over so many tokens, once for all that are built alike, and for texts of any length. The
first call of each is held to what the module itself makes: where that differs, or where there is no
code, the module runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache, partial
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as torch_module
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer

from offramp.engine.executors.modules.code import MOST_ROWS, Code, Codes, tensors_of
from offramp.engine.executors.slots.cache import SlotLayer
from offramp.engine.kv_cache import CACHE_NAMES, self_attention
from offramp.models.backbone import Backbone
from offramp.models.exits import first
from offramp.models.opened import HeadCode
from offramp.models.quantized.prepacked import ROWS, filled_up

BACKEND = "inductor"
LONG = {
    "attention_mask": 1,
    "position_bias": 1,
    "encoder_attention_mask": 1,
    "encoder_hidden_states": 2,
}
"""Arguments with a dimension as long as the text, or as what the encoder read; from the last."""
_NEAR = {torch.float32: 1e-3, torch.float64: 1e-6}
"""How far code may be from its module, as part of the largest value; in half precision a tenth."""

Run = Callable[[nn.Module, Sequence[Tensor]], Tensor]
"""Calls a module with inputs."""


# -- bare twins -----------------------------------------------------------------------------------

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_GLOBAL_HOOKS = [getattr(torch_module, f"_global{table}") for table in _HOOKS]
"""Tables that stay the same objects."""
_CALLS = (nn.Module.__call__, GradientCheckpointingLayer.__call__)


_LEAST = 2**17
"""Numbers of a weight from which on two or three rows take longer than four, by MKL's product."""


class FilledLinear(nn.Linear):
    """A linear that takes two or three rows as four."""

    def forward(self, states: Tensor) -> Tensor:
        tokens = states.numel() // self.in_features
        if not 1 < tokens < ROWS or states.requires_grad:
            return functional.linear(states, self.weight, self.bias)
        return filled_up(states, lambda rows: functional.linear(rows, self.weight, self.bias))


def _gains_by_filling(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or not torch._C.has_mkl:
        return False
    weight = module.weight
    here = weight.dtype == torch.float32 and weight.device.type == "cpu"
    return here and weight.numel() >= _LEAST


class BareModules(dict[Any, Any]):
    """Bare twins by the module in whose place they are called; made when first asked for, for one
    generation."""

    def __init__(self, caller: str) -> None:
        """caller: the Python module of the code that calls them."""
        super().__init__()
        self._caller = caller

    def __missing__(self, module: Any) -> Any:
        if not isinstance(module, nn.Module):
            return module  # a method
        made = self[module] = bare(module, self._caller)
        return made


def bare(module: nn.Module, caller: str, *, fill: bool = True) -> nn.Module:
    """The twin of a module; the module itself where something stands around its `forward`.

    caller: the Python module of the code that calls it. fill: whether linears may be filled up.
    """
    if not _is_plain(module):
        return module
    kind: Any = FilledLinear if fill and _gains_by_filling(module) else type(module)
    made: Any = object.__new__(_straight(kind, kind.forward.__module__ == caller))
    made.__dict__.update(module.__dict__)
    parts = {
        name: None if part is None else bare(part, kind.forward.__module__, fill=fill)
        for name, part in module._modules.items()
    }
    made.__dict__["_modules"] = parts
    made.__dict__.update(parts)
    made.__dict__.update(module._parameters)
    made.__dict__.update(module._buffers)
    return made  # type: ignore[no-any-return]


def _is_plain(module: nn.Module) -> bool:
    own = module.__dict__
    return (
        type(module).__call__ in _CALLS
        and not module.training
        and "forward" not in own
        and own.get("_compiled_call_impl") is None
        and not any(own.get(table) for table in _HOOKS)
        and not any(_GLOBAL_HOOKS)
    )


@cache
def _straight(kind: Any, by_kin: bool) -> type[nn.Module]:
    """A class of modules as `kind`, called without what `nn.Module` does around `forward`.

    by_kin: whether code of the same file calls them; it uses no deprecated names, so that what
    Hugging Face wraps around `forward` to translate these has nothing to do.
    """
    forward: Callable[..., Any] = kind.forward
    while by_kin and forward.__code__.co_filename.endswith("deprecation.py"):
        forward = forward.__wrapped__  # type: ignore[attr-defined]
    return type(kind.__name__, (kind,), {"__call__": forward, "__module__": kind.__module__})


# -- code -----------------------------------------------------------------------------------------


class _Compiled:
    """A module that is called as code. plain: its twin without code."""

    def __init__(self, codes: Codes, module: nn.Module, plain: Any) -> None:
        self.codes: Codes = codes
        self.module: nn.Module = module
        self.plain: Any = plain
        self.kind, self.held = codes.known(module)
        self.weights: list[Tensor] = [tensor for _, _, tensor in tensors_of(module)]

    def compute(
        self,
        key: tuple[Any, ...],
        inputs: Sequence[Tensor],
        run: Run,
        lengths: dict[int, int],
        at: tuple[int, ...] = (),
    ) -> Tensor | None:
        """What `run` makes of the module and inputs, by code; None where there is none.

        key: how many tokens, and all else that makes another kind of call. lengths: as of `Code`.
        at: all lengths.
        """
        if key in self.kind.codes:
            code = self.kind.codes[key]
        else:
            name = type(self.module).__name__
            code = self.codes.make(
                self.kind, key, name, lambda: self._compile(inputs, run, lengths)
            )
        if code is None or not code.fits(at, inputs):
            return None
        if key not in self.held and not self._holds(code, key, inputs, run):
            return None
        return code(*inputs, *self.weights)

    def _compile(self, inputs: Sequence[Tensor], run: Run, lengths: dict[int, int]) -> Code:
        twin = bare(self.module, type(self.module).__module__, fill=False)
        places = tensors_of(twin)

        def traced(inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
            for (part, name, _), weight in zip(places, weights, strict=True):
                part.__dict__[name] = weight
            return run(twin, inputs)

        return Code(traced, inputs, self.weights, lengths, BACKEND)

    def _holds(self, code: Code, key: Any, inputs: Sequence[Tensor], run: Run) -> bool:
        """Whether the code makes what the module makes, and writes what it writes."""
        name = type(self.module).__name__
        theirs = [run(self.plain, inputs), *(tensor.clone() for tensor in inputs)]
        try:
            ours = [code(*inputs, *self.weights), *inputs]
        except Exception as error:  # code that was just made raises whatever is in its way
            wrong = f"code of {name} raised {type(error).__name__}: {error}"
        else:
            if all(map(_near, ours, theirs)):
                self.held.add(key)
                return True
            wrong = f"code of {name} came to something else than itself"
        self.kind.codes[key] = None
        self.codes.warn(wrong)
        for tensor, before in zip(inputs, theirs[1:], strict=True):
            if not torch.equal(tensor, before):
                tensor.copy_(before)
        return False


class CompiledLayer(_Compiled):
    """A decoder layer or an exit. index: of its entry in the cache."""

    def __init__(self, codes: Codes, module: nn.Module, plain: Any, index: int) -> None:
        super().__init__(codes, module, plain)
        self._index = index
        self._names = [*inspect.signature(type(module).forward).parameters][2:]

    def __call__(self, hidden: Tensor, *args: Any, **kw: Any) -> Any:
        made, named = None, {**dict(zip(self._names, args, strict=False)), **kw}
        cached = next((name for name in CACHE_NAMES if name in named), "")
        cache = named.pop(cached, None)
        if len(hidden) == 1 and hidden.shape[1] <= MOST_ROWS:
            kept = self._kept(cache)
            made = None if kept is None else self._by_code(hidden, named, cached, *kept)
        return self.plain(hidden, *args, **kw) if made is None else made

    def _kept(self, cache: Any) -> tuple[list[Tensor], tuple[int, ...]] | None:
        """Keys and values as far as the call reads, and those of an encoder; and all lengths. None
        where the module itself must make room for some."""
        own = self_attention(cache)
        entry = own.layers[self._index]
        if not isinstance(entry, SlotLayer) or not entry.is_initialized:
            return None
        call = entry.current.call
        if call.beside is None:
            return None
        (slot, _), read, room = call.beside, call.width, entry.held[0].shape[2]
        if room <= read or read < 2:
            return None
        kept = [held.narrow(0, slot, 1).narrow(2, 0, read) for held in entry.held]
        if own is cache:
            return kept, (read, room)
        across = cache.cross_attention_cache.layers[self._index]
        if not cache.is_updated.get(self._index) or across.keys.shape[2] < 2:
            return None
        return [*kept, across.keys, across.values], (read, room, across.keys.shape[2])

    def _by_code(
        self,
        hidden: Tensor,
        named: dict[str, Any],
        cached: str,
        kept: list[Tensor],
        at: tuple[int, ...],
    ) -> Tensor | None:
        inputs = [hidden, *kept]
        lengths = dict.fromkeys(range(1, len(inputs)), 2)
        layout: list[tuple[Any, ...]] = []
        for name, value in named.items():
            if isinstance(value, Tensor):
                if name in LONG:
                    lengths[len(inputs)] = value.dim() - LONG[name]
                inputs.append(value.contiguous() if name in LONG else value)
                layout.append((name, 1, None))
            elif isinstance(value, tuple):
                inputs.extend(value)
                layout.append((name, len(value), tuple))
            else:
                layout.append((name, 0, value))
        key = hidden.shape[1], hidden.dtype, cached, len(kept), *layout
        return self.compute(key, inputs, partial(_run_layer, key), lengths, at)


class CompiledHead(_Compiled):
    """The LM head, over rows [N, D]."""

    def __call__(self, rows: Tensor) -> Tensor:
        made = None
        if len(rows) <= MOST_ROWS and not rows.requires_grad:
            made = self.compute((len(rows), rows.dtype), [rows.contiguous()], _run_head, {})
        return self.plain(rows) if made is None else made


class CompiledModules(BareModules):
    """Code or bare twins by the module in whose place they are called, for one generation."""

    def __init__(self, codes: Codes, caller: str) -> None:
        super().__init__(caller)
        self._codes = codes

    def __missing__(self, module: Any) -> Any:
        plain = super().__missing__(module)
        index = _entry(module) if isinstance(module, nn.Module) else None
        if index is None:
            return plain
        if _share_parts(module, plain):
            self._codes.warn(f"there are hooks on parts of {type(module).__name__}")
            return plain
        made = self[module] = CompiledLayer(self._codes, module, plain, index)
        return made


_CODES: WeakKeyDictionary[nn.Module, Codes] = WeakKeyDictionary()
"""By model."""


def called_in_place(backbone: Backbone) -> BareModules:
    """Return by module what decoding calls in its place."""
    caller, codes = type(backbone.stack).forward.__module__, _codes(backbone)
    return BareModules(caller) if codes is None else CompiledModules(codes, caller)


def head_code(backbone: Backbone) -> HeadCode | None:
    """Return what decoding calls in the LM head's place; None: the head itself."""
    codes, head = _codes(backbone), backbone.head
    twin = bare(head, type(backbone.stack).forward.__module__)
    if _share_parts(head, twin):
        return None
    if codes is not None:
        return CompiledHead(codes, head, backbone.reader)
    return twin if isinstance(twin, FilledLinear) and backbone.reader is head else None


def cannot_compile(backbone: Backbone, reason: str) -> None:
    """Warn that decoding runs as before, where it was to be compiled; once for a model."""
    if backbone.decoding.compiled:
        _CODES.setdefault(backbone.model, Codes()).warn(reason)


def _codes(backbone: Backbone) -> Codes | None:
    """All code of a backbone that is decoded by code."""
    if backbone.device.type != "cpu":
        cannot_compile(backbone, f"the model is on {backbone.device}, and code is for a CPU")
        return None
    return _CODES.setdefault(backbone.model, Codes()) if backbone.decoding.compiled else None


class _Written:
    """A cache of one layer, whose last columns are those of the tokens that it is called with."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self._keys[:, :, -keys.shape[2] :] = keys
        self._values[:, :, -values.shape[2] :] = values
        return self._keys, self._values

    def get_seq_length(self, *_: Any) -> int:
        """For code that asks and, with a bias at hand, has no use for it."""
        return 0


class _WrittenBeside(EncoderDecoderCache):
    """The same beside an encoder's keys and values. index: of the layer's entry."""

    def __init__(self, own: _Written, keys: Tensor, values: Tensor, index: Any) -> None:
        self.self_attention_cache: Any = own
        entry = SimpleNamespace(keys=keys, values=values)
        self.cross_attention_cache: Any = SimpleNamespace(layers={index: entry})
        self.is_updated = {index: True}


def _run_layer(key: tuple[Any, ...], layer: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    rest = iter(inputs)
    hidden = next(rest)
    cache: Any = _Written(next(rest), next(rest))
    if key[3] == 4:
        cache = _WrittenBeside(cache, next(rest), next(rest), _entry(layer))
    named: dict[str, Any] = {key[2]: cache}
    for name, count, value in key[4:]:
        taken = tuple(next(rest) for _ in range(count))
        named[name] = value if not count else taken if value is tuple else taken[0]
    return first(layer(hidden, **named))


def _run_head(head: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    return head(inputs[0])  # type: ignore[no-any-return]


def _share_parts(module: nn.Module, twin: nn.Module) -> bool:
    """Whether parts of a module are in its twin as they are: something stands around them."""
    own = {id(part) for part in module.modules()}
    return any(id(part) in own for part in twin.modules())


def _entry(module: nn.Module) -> int | None:
    """The cache entry that a layer writes to; None where it writes to none or to several."""
    found = {getattr(part, "layer_idx", None) for part in module.modules()} - {None}
    index = found.pop() if len(found) == 1 else None
    return index if isinstance(index, int) else None


def _near(ours: Tensor, theirs: Tensor) -> bool:
    if torch.equal(ours, theirs) or not theirs.is_floating_point():
        return torch.equal(ours, theirs)
    far = (ours - theirs).abs().max()
    return bool(far <= _NEAR.get(theirs.dtype, 0.1) * theirs.abs().max())
