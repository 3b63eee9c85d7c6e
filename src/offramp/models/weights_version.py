"""Whether modules still compute what they computed: for what is kept of their results."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

_READ = {"_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks", "training"}
_RECORDERS = "output_capturing"
"""Of Hugging Face: hooks that only note what goes by, hung where a module runs for the first time,
and a mark that they are there."""
_SKIPPED = frozenset(vars(nn.Module())) - _READ | {f"_{_RECORDERS}_hooks_installed"}
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
    return [part for module in root.modules() for part in _parts(module)]


def _parts(module: nn.Module) -> Iterator[Any]:
    yield _Same(module)
    for name, value in vars(module).items():
        if name in _SKIPPED:
            continue
        if name in ("_parameters", "_buffers"):
            for tensor in value.values():
                if tensor is not None:
                    yield _Same(tensor)
                    yield _written(tensor)
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


def _written(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor's values are, and how often they were written in place."""
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
