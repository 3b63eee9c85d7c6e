"""Whether modules still compute what they computed: for what is kept of their results."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

from torch import Tensor, nn, strided

_READ = {"_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks", "training"}
_RECORDERS = "output_capturing"
"""Of Hugging Face: hooks that only note what goes by, hung where a module runs for the first time,
and a mark that they are there."""
_SKIPPED = frozenset(vars(nn.Module())) - _READ | {f"_{_RECORDERS}_hooks_installed"}
_UNREAD = _SKIPPED - {"_modules"}
_VERSION = attrgetter("_version")
_PLAIN = (bool, int, float, str, type(None))


class _Same:
    """An object, held weakly; equal to itself alone, never to another at its address."""

    def __init__(self, it: Any) -> None:
        self._ref = weakref.ref(it)

    def __eq__(self, other: object) -> bool:
        it = self._ref()
        return isinstance(other, _Same) and it is not None and it is other._ref()

    __hash__ = None  # type: ignore[assignment]


def weights_version(root: nn.Module) -> list[Any]:
    """A value that is equal to an earlier one while `root` computes what it did then.

    It changes with a module or a tensor that is swapped, with a tensor that is written in place, by
    an optimiser or `load_state_dict`, with hooks, and with a module's switches: LoRA that is
    loaded, merged, scaled, turned off. What is written through `tensor.data` in place goes unseen:
    PyTorch does not count it.
    """
    return _version(root.modules())


def _version(modules: Iterable[nn.Module]) -> list[Any]:
    return [part for module in modules for part in _parts(module)]


class Unchanged:
    """Tells whether modules still compute what they did when this was made, for callers that ask
    often.

    As long as all that they hold are the very objects of the time before, and no tensor was
    written, nothing else is looked at; else `weights_version` decides. That takes a sixth of the
    time on a tower of 158 modules.
    """

    def __init__(self, modules: Callable[[], Iterable[nn.Module]]) -> None:
        """modules: returns them, such as `tower.modules`."""
        self._modules, self._version = modules, _version(modules())
        self._note()

    def __call__(self) -> bool:
        with suppress(KeyError, RuntimeError):  # a name is gone, or no version is counted any more
            if self._seen() == self._shape and all(map(is_, self._objects(), self._held)):
                return True
        if _version(self._modules()) != self._version:
            return False
        self._note()
        return True

    def _note(self) -> None:
        own = [vars(module) for module in self._modules()]
        read = [[name for name in each if name not in _UNREAD] for each in own]
        values = [each[name] for each, names in zip(own, read, strict=True) for name in names]
        self._own = [(itemgetter(*names), each) for names, each in zip(read, own, strict=True)]
        inner = [value for value in values if isinstance(value, (dict, list))]
        self._full = [value for value in inner if value]
        self._tables = [*own, *inner]
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
        full = [each.values() if isinstance(each, dict) else each for each in self._full]
        return chain.from_iterable((*own, *full))

    def _seen(self) -> list[Any]:
        versions, places = map(_VERSION, self._plain), map(Tensor.data_ptr, self._plain)
        return [*map(len, self._tables), *versions, *places, *map(written, self._others)]


def _parts(module: nn.Module) -> Iterator[Any]:
    yield _Same(module)
    for name, value in vars(module).items():
        if name in _SKIPPED:
            continue
        if name in ("_parameters", "_buffers"):
            for tensor in value.values():
                if tensor is not None:
                    yield _Same(tensor)
                    yield written(tensor)
        elif name in ("_forward_hooks", "_forward_pre_hooks"):
            yield tuple(key for key, hook in value.items() if not _records(hook))
        elif name == "forward":
            yield _Same(value) if hasattr(value, "__weakref__") else id(value)
        elif isinstance(value, _PLAIN):
            yield value
        elif isinstance(value, (list, dict)):
            yield _switches(value)


def _records(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).endswith(_RECORDERS)


def written(tensor: Tensor) -> tuple[int, int]:
    """Return where a tensor's values are, and how often they were written in place."""
    counted = not tensor.is_inference()  # those cannot be written outside of inference mode
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # a subclass that holds several
        address = 0
    return address, tensor._version if counted else 0


def _switches(value: Any) -> Any:
    """The plain values in a list or dict, as PEFT keeps its own."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return [(name, it) for name, it in pairs if isinstance(it, _PLAIN)]
