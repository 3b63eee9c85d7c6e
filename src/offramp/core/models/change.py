"""Whether a model still computes what it computed: the one detector of change.

Plans, bare twins, tables, caches, a guarantee's conditions and the digest of exits ask it. Modules,
tensors, hooks and code are the same only as long as they are the same objects.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from operator import attrgetter, is_, itemgetter
from types import FunctionType
from typing import Any

from torch import Tensor, nn, strided
from torch.nn.modules import module as torch_module
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from offramp.core.models.weights import OwnLinear

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = [getattr(torch_module, f"_global{table}") for table in HOOKS]
"""Tables that stay the same objects."""
_READ = {"_parameters", "_buffers", "_modules", *HOOKS[:2], "training"}
_RECORDERS = "output_capturing"
"""Of Hugging Face: hooks that only note what goes by, hung where a module runs for the first time,
and a mark that they are there."""
_UNREAD = frozenset(vars(nn.Module())) - _READ | {f"_{_RECORDERS}_hooks_installed"}
_VERSION = attrgetter("_version")
_PLAIN = (bool, int, float, str, type(None))
_OURS = "offramp"
"""Begins the names of this package's modules and of what it registers with Hugging Face."""


class _Same:
    """An object, held weakly; equal to itself alone, never to another at its address."""

    def __init__(self, it: Any) -> None:
        self._ref = weakref.ref(it)

    def __eq__(self, other: object) -> bool:
        it = self._ref()
        return isinstance(other, _Same) and it is not None and it is other._ref()

    __hash__ = None  # type: ignore[assignment]


def state_of(*roots: nn.Module, but: Collection[nn.Module] = ()) -> list[Any]:
    """Return a value that stays equal while modules, and all below, compute the same.

    It changes with a module, a tensor or a hook that is swapped; with a tensor that is written in
    place; with an attribute or the configuration of a module; and with code: of an instance, of its
    class, of the class's file, and of the registered attention and mask functions. Writing through
    `tensor.data` in place goes unseen, because PyTorch does not count it. but: modules that are
    left out, with all below them.
    """
    return [(name, _token(value)) for name, value in _things(roots, but)]


class Unchanged:
    """Tells whether modules still compute what they did at this object's creation, for frequent
    calls.

    While all their objects are the same and no tensor was written, nothing else is compared; else
    `state_of` decides.
    """

    def __init__(
        self, roots: Callable[[], Iterable[nn.Module]], but: Callable[[], Any] = tuple
    ) -> None:
        """roots, but: return what `state_of` takes."""
        self._roots, self._but = roots, but
        self._state = state_of(*roots(), but=but())
        self._note()

    def __call__(self) -> bool:
        with suppress(KeyError, RuntimeError):  # a name is gone, or no version is counted any more
            if self._seen() == self._shape and self._is_held():
                return True
        if state_of(*self._roots(), but=self._but()) != self._state:
            return False
        self._note()
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (bool,)  # of a copy's modules nothing was noted: it says no

    def _note(self) -> None:
        modules = _modules(self._roots(), self._but())
        self._kinds = [weakref.ref(module) for module in modules]
        own = [vars(it) for it in (*modules, *_configs(modules))]
        read = [[name for name in each if name not in _UNREAD] for each in own]
        values = [each[name] for each, names in zip(own, read, strict=True) for name in names]
        inner = [value for value in values if isinstance(value, (dict, list))]
        self._full: list[Any] = [value for value in inner if value]
        self._full += [
            it for it in values if type(it) is tuple and not {*map(type, it)} <= {*_PLAIN}
        ]
        self._full += [table for _, table in _tables(modules)]
        self._tables = [*own, *inner]
        files = [*_files(modules).values()]
        read += [[n for n, it in [*each.items()] if isinstance(it, _NAMED)] for each in files]
        both = zip(read, (*own, *files), strict=True)
        self._own = [(_getter(names), each) for names, each in both]
        self._held = [*self._objects()]  # kept, so that no other comes to their addresses
        tensors = [it for it in self._held if isinstance(it, Tensor)]
        plain = [it for it in tensors if type(it) in (Tensor, nn.Parameter)]
        # `written`, without its calls. oneDNN's tensors and sparse ones have no address.
        self._plain = [it for it in plain if it.layout is strided and not it.is_inference()]
        known = {*map(id, self._plain)}
        self._others = [it for it in tensors if id(it) not in known]
        self._shape = self._seen()

    def _objects(self) -> Iterator[Any]:
        own = [read(each) for read, each in self._own]
        full = [each if isinstance(each, _LISTS) else each.values() for each in self._full]
        return chain.from_iterable((*own, *full))

    def _is_held(self) -> bool:
        now = [*self._objects()]
        return len(now) == len(self._held) and all(map(is_, now, self._held))

    def _seen(self) -> list[Any]:
        versions, places = map(_VERSION, self._plain), map(Tensor.data_ptr, self._plain)
        kinds = [type(module()) for module in self._kinds]
        return [*kinds, *map(len, self._tables), *versions, *places, *map(written, self._others)]


def written(tensor: Tensor) -> tuple[int, int]:
    """Return the address of a tensor's values, and how often they were written in place."""
    counted = not tensor.is_inference()  # those cannot be written outside of inference mode
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # a subclass that holds several
        address = 0
    return address, tensor._version if counted else 0


# -- what is looked at -----------------------------------------------------------------------------

_LISTS = (list, tuple)
_CONFIGS = {"config", "generation_config"}


_CODE = (FunctionType, type)
_NAMED = (*_CODE, type(None))
"""Of a file's names: code, and what may become code. In a notebook the others come and go."""


def _getter(names: Sequence[str]) -> Callable[[Any], Any]:
    return itemgetter(*names) if len(names) > 1 else lambda each: [each[name] for name in names]


def _modules(roots: Iterable[nn.Module], but: Collection[nn.Module]) -> list[nn.Module]:
    seen = {id(module) for each in but for module in each.modules()}
    found = [module for root in roots for module in root.modules() if id(module) not in seen]
    return [*{id(module): module for module in found}.values()]


def _tables(modules: Sequence[nn.Module]) -> list[tuple[str, Any]]:
    """The names of the modules' classes, of hooks on all modules, and of the functions that Hugging
    Face looks up by name."""
    kinds = {kind for one in {*map(type, modules)} for kind in one.__mro__}
    kinds = {kind for kind in kinds if not kind.__module__.startswith(("torch.", "builtins"))}
    tables: tuple[Any, ...] = (ALL_ATTENTION_FUNCTIONS, AttentionMaskInterface)
    return [
        *((f"class {kind.__qualname__} {id(kind)}", vars(kind)) for kind in kinds | {nn.Module}),
        *((f"hooks {number}", table) for number, table in enumerate(GLOBAL_HOOKS)),
        *((f"by name {number}", table._global_mapping) for number, table in enumerate(tables)),
        ("by name here", ALL_ATTENTION_FUNCTIONS._local_mapping),
    ]


def _files(modules: Sequence[nn.Module]) -> dict[str, dict[str, Any]]:
    """The names of the Python files in which the modules' classes stand, by file."""
    files = {type(module).__module__ for module in modules} & sys.modules.keys()
    return {name: vars(sys.modules[name]) for name in files if not name.startswith("torch.")}


def _configs(modules: Iterable[nn.Module]) -> list[Any]:
    """Configurations of models and of generation, each once, with those inside."""
    found: dict[int, Any] = {}
    waiting = [own[name] for own in map(vars, modules) for name in _CONFIGS & own.keys()]
    while waiting:
        config = waiting.pop()
        if id(config) not in found and hasattr(config, "__dict__"):
            found[id(config)] = config
            waiting += [each for each in vars(config).values() if hasattr(each, "to_diff_dict")]
    return [*found.values()]


def _things(roots: Iterable[nn.Module], but: Collection[nn.Module]) -> Iterator[tuple[str, Any]]:
    """Whatever may change what the modules compute, with its name."""
    modules = _modules(roots, but)
    for module in modules:
        yield "module", module
        yield "class", type(module)
        for name, value in vars(module).items():
            if name not in _UNREAD and name not in _CONFIGS:
                yield from _inside(name, value)
    for config in _configs(modules):
        for name, value in vars(config).items():
            yield from _inside(name, value)
    for _, code in sorted(_code(modules).items()):
        yield from code


def _code(modules: Sequence[nn.Module]) -> dict[str, list[tuple[str, Any]]]:
    """Code by table and file, without names that mean nothing."""
    files = {
        f"file {name}": {n: it for n, it in [*names.items()] if isinstance(it, _CODE)}
        for name, names in _files(modules).items()
    }
    return {
        name: [(n, v) for n, v in ((str(k), v) for k, v in table.items()) if _means(n)]
        for name, table in (*_tables(modules), *files.items())
    }


def _means(name: str) -> bool:
    return name == "__call__" or not name.startswith(("__", "_abc_", _OURS))


def _inside(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A value, or those of a table or list, in which PEFT keeps its switches."""
    if isinstance(value, dict):
        pairs = ((f"{name}.{key}", it) for key, it in value.items())
        yield from (pair for pair in pairs if not (name in HOOKS and is_recorder(pair[1])))
    elif isinstance(value, _LISTS):
        yield from ((f"{name}.{number}", it) for number, it in enumerate(value))
    else:
        yield name, value


def _token(value: Any) -> Any:
    """What is equal as long as a value is the same."""
    if isinstance(value, Tensor):
        return _Same(value), written(value)
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (dict, list, tuple, set, frozenset)):
        return repr(value)
    try:
        return _Same(value)
    except TypeError:  # what nothing can hold weakly
        return id(value)


def is_recorder(hook: Any) -> bool:
    """Return True for a hook of Hugging Face's that only notes what goes by."""
    return str(getattr(hook, "__module__", "")).endswith(_RECORDERS)


_STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def tokens_of(tokenizer: Any) -> tuple[Any, ...]:
    """Return a value that stays equal while a tokenizer spells the same: the tokenizer, the steps
    inside it, and the added tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    inside = getattr(tokenizer, "_tokenizer", None)
    marks = getattr(tokenizer, "special_tokens_map", {})
    chosen = {n: v for n, v in getattr(tokenizer, "__dict__", {}).items() if isinstance(v, _PLAIN)}
    parts = (getattr(inside, name, None) for name in _STEPS)
    steps = [None if part is None else part.__getstate__() for part in parts]
    return _token(tokenizer), _token(inside), repr((added, marks, chosen)), steps


# -- answers alone ---------------------------------------------------------------------------------


def answers_of(root: nn.Module) -> dict[str, Any]:
    """Return a value for `same_answers`: tensors, hooks, code and active PEFT adapters, by path;
    for weights laid out anew, only a mark. The value refers to no part of the model."""
    state: dict[str, Any] = {}
    for path, module in root.named_modules():
        if isinstance(module, OwnLinear):
            state[path] = None
            continue
        state[path] = _Same(type(module))
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                state[f"{path} {name}"] = _Place(tensor)
        inside = [it for n, v in vars(module).items() if n not in _UNREAD for it in _inside(n, v)]
        state[f"{path} set"] = {n: _token(it) for n, it in inside if _acts(it)}
    for table, code in _code([*root.modules()]).items():
        state[f"code {table}"] = {name: _token(it) for name, it in code}
    return state


def _acts(value: Any) -> bool:
    """Whether a value is a number, text or switch, or code that runs, such as a hook."""
    return isinstance(value, _PLAIN) or (callable(value) and not isinstance(value, nn.Module))


class _Place:
    """Where a tensor is; equal while its numbers are the same."""

    def __init__(self, tensor: Tensor) -> None:
        self._it, (self._at, self._count) = _Same(tensor), written(tensor)
        self._kind, self._device = tensor.dtype, tensor.device

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Place) or self._it != other._it:
            return False
        moved = self._device != other._device
        return (self._count, self._kind) == (other._count, other._kind) and (
            moved or self._at == other._at
        )

    __hash__ = None  # type: ignore[assignment]


def same_answers(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return True if a model gives the same answers at two moments. Neither another layout of a
    weight (`OwnLinear`) nor another device counts as a change."""
    laid_out = {path for path, kind in now.items() if kind is None}
    for key in {*before, *now}:
        path, one, other = key.partition(" ")[0], before.get(key), now.get(key)
        if path == "code" and (one is None or other is None):
            continue  # of a class that came or went: the path that has it tells
        if "by name" in key and one and other:  # what was not registered may be used by nobody
            other = {name: other[name] for name in one if name in other}
        if path not in laid_out and one != other:
            return False
    return True
