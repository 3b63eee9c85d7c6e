"""Machine code that decoding calls in the place of layers, exits and the LM head.

Code is for the few tokens that decoding reads at a time. It is compiled when a module is first
called over so many tokens, once for all that are built alike, and for texts of any length. The
first call of each is held to what the module itself makes: where that differs, or where there is no
code, the module runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache

from offramp.core.executors.bare import BareModules, bare, share_parts
from offramp.core.executors.kv_cache import CACHE_NAMES, self_attention
from offramp.core.executors.slots.cache import SlotLayer
from offramp.core.models.backbone import Backbone
from offramp.core.models.opened import first
from offramp.features.compiled.code import MOST_ROWS, Code, Codes, tensors_of

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
        twin = bare(self.module, type(self.module).__module__, own=False)
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
    """Compiled code or bare twins for one generation, by the module that each replaces."""

    def __init__(self, codes: Codes, caller: str) -> None:
        super().__init__(caller)
        self._codes = codes

    def __missing__(self, module: Any) -> Any:
        plain = super().__missing__(module)
        index = _entry(module) if isinstance(module, nn.Module) else None
        if index is None:
            return plain
        if share_parts(module, plain):
            self._codes.warn(f"there are hooks on parts of {type(module).__name__}")
            return plain
        made = self[module] = CompiledLayer(self._codes, module, plain, index)
        return made


_CODES: WeakKeyDictionary[nn.Module, Codes] = WeakKeyDictionary()
"""By model."""


def codes_of(backbone: Backbone) -> Codes:
    """Return the store of compiled code for a backbone's model."""
    return _CODES.setdefault(backbone.model, Codes())


class ByCode:
    """Replaces layers, exits and head by compiled code (`Instead`), on a CPU alone."""

    name = "compiled"

    def modules(self, backbone: Backbone, caller: str) -> CompiledModules | None:
        codes_of(backbone).look_again()
        return CompiledModules(codes_of(backbone), caller) if _on_cpu(backbone) else None

    def head(self, backbone: Backbone) -> CompiledHead | None:
        if not _on_cpu(backbone):
            return None
        return CompiledHead(codes_of(backbone), backbone.head, backbone.reader)

    def left_out(self, backbone: Backbone, reason: str) -> None:
        """Warn, once for a model, that its modules run uncompiled."""
        codes_of(backbone).warn(reason)


COMPILED = ByCode()


def _on_cpu(backbone: Backbone) -> bool:
    on_cpu = backbone.device.type == "cpu"
    if not on_cpu:
        codes_of(backbone).warn(f"the model is on {backbone.device}, and code is for a CPU")
    return on_cpu


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
