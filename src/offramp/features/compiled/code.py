"""Machine code of a call over a few rows, by inductor; weights are arguments of it.

So modules that are built alike share one piece of code; `Codes` knows which are. Products with few
rows are sums over each row of the weights: at the speed of memory, which the libraries behind
PyTorch do not reach for one row, and reading the weights once for all rows.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

MOST_ROWS = 8
"""Of more rows the libraries' products are as fast."""

_OPTIONS = {"size_asserts": False, "alignment_asserts": False}


class CannotCompileError(Exception):
    """Raised where no code can be made for a call: the module itself must run."""


class Code:
    """Compiled code of the function `run`, called with inputs and weights. What the code writes
    into inputs stays."""

    def __init__(
        self,
        run: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor],
        inputs: Sequence[Tensor],
        weights: Sequence[Tensor],
        lengths: Mapping[int, int],
        backend: str = "inductor",
    ) -> None:
        """run: of inputs and weights. lengths: by the index of an input its dimension that may have
        any length; all others are as they are here. backend: "inductor", or "eager" for the graph
        as it was traced.

        Raises:
            CannotCompileError: the call depends on values, or there is no compiler.
        """
        try:
            self._call, self._guards, self._sizes = _compile(run, inputs, weights, lengths, backend)
        except Exception as error:  # tracing and compiling raise whatever is in the way
            lines = str(error).strip().splitlines() or [""]
            raise CannotCompileError(f"{type(error).__name__}: {lines[0]}") from error
        self._fits: dict[Any, bool] = {}

    def fits(self, lengths: tuple[int, ...], inputs: Sequence[Tensor]) -> bool:
        """Return True if the code also fits inputs of these lengths; computed once for each tuple
        of lengths."""
        known = self._fits.get(lengths)
        if known is None:
            known = self._fits[lengths] = bool(
                self._guards is None or self._sizes.evaluate_guards_expression(self._guards, inputs)
            )
        return known

    def __call__(self, *tensors: Tensor) -> Tensor:
        return self._call(*tensors)[0]  # type: ignore[no-any-return]


def _compile(
    run: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    lengths: Mapping[int, int],
    backend: str,
) -> tuple[Callable[..., Any], str | None, Any]:
    """The code, what must hold of its inputs' sizes, and what evaluates that."""
    from torch._dynamo.source import ConstantSource
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    sizes = ShapeEnv()
    fake = FakeTensorMode(shape_env=sizes, allow_non_fake_inputs=True)

    def example(index: int, tensor: Tensor) -> Any:
        kinds = [DimDynamic.STATIC] * tensor.dim()
        if index in lengths:
            kinds[lengths[index]] = DimDynamic.DYNAMIC
        context: Any = StatelessSymbolicContext(
            dynamic_sizes=kinds, dynamic_strides=[DimDynamic.INFER_STRIDE] * tensor.dim()
        )
        like = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )
        return fake.from_tensor(
            like, source=ConstantSource(f"input{index}"), symbolic_context=context
        )

    def flat(*tensors: Tensor) -> tuple[Tensor]:
        return (run(tensors[: len(inputs)], tensors[len(inputs) :]),)

    with torch.inference_mode(False), torch.no_grad():
        examples = [example(i, tensor) for i, tensor in enumerate((*inputs, *weights))]
        graph = make_fx(flat, decomposition_table=_PRODUCTS)(*examples)
        if backend == "inductor":
            with tracing(TracingContext(fake)):
                call: Any = compile_fx(graph, examples, config_patches=_OPTIONS)
        else:
            call = graph
    guards = sizes.produce_guards_expression(examples) if lengths else None
    return call, guards, sizes


def _mm(rows: Tensor, columns: Tensor) -> Tensor:
    """A product [M, K] x [K, N] of few rows with weights that lie as [N, K]."""
    few = isinstance(rows.shape[0], int) and rows.shape[0] <= MOST_ROWS
    if not few or rows.device.type != "cpu" or columns.stride(0) != 1:
        return NotImplemented  # type: ignore[no-any-return]
    # As a tensor of its own: else each sum computes anew what made the rows, such as a norm.
    rows, weights = rows.as_strided(rows.shape, rows.stride()), columns.t()
    return torch.stack([(weights * row).sum(-1) for row in rows.unbind()])


def _addmm(
    bias: Tensor, rows: Tensor, columns: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    if beta != 1 or alpha != 1:
        return NotImplemented  # type: ignore[no-any-return]
    product = _mm(rows, columns)
    return product if product is NotImplemented else product + bias


_PRODUCTS: Any = {torch.ops.aten.mm.default: _mm, torch.ops.aten.addmm.default: _addmm}


# -- which modules are built alike, and all their code --------------------------------------------

_COMMON = frozenset(nn.Module().__dict__) | {"layer_idx"}


class Kind:
    """Modules with the same structure. codes: by kind of call; None where no code could be made."""

    def __init__(self, parts: list[Any], weights: list[Any]) -> None:
        self.parts: list[Any] = parts
        self.weights: list[Any] = weights
        self.codes: dict[Any, Code | None] = {}


class Codes:
    """The compiled code of one backbone and of the exits on it."""

    def __init__(self) -> None:
        self._kinds: list[Kind] = []
        self._of: WeakKeyDictionary[nn.Module, tuple[Kind, set[Any]]] = WeakKeyDictionary()
        self._lock = threading.RLock()
        self._warned = False

    def known(self, module: nn.Module) -> tuple[Kind, set[Any]]:
        """Return the kind of a module, and the kinds of call for which its code was found right."""
        weights = _layout(module)
        with self._lock:
            known = self._of.get(module)
            if known is None or known[0].weights != weights:  # they may have been converted
                parts = _parts(module)
                alike = (k for k in self._kinds if k.weights == weights and _equal(k.parts, parts))
                kind = next(alike, None)
                if kind is None:
                    kind = Kind(parts, weights)
                    self._kinds.append(kind)
                known = self._of[module] = kind, set()
            return known

    def look_again(self) -> None:
        """Make each module compare itself with its code once more at its next call."""
        with self._lock:
            self._of.clear()

    def make(self, kind: Kind, key: Any, name: str, compile_it: Callable[[], Code]) -> Code | None:
        """Return the code for this kind of call; None, and a warning, where none can be made."""
        with self._lock:
            if key not in kind.codes:
                start = time.perf_counter()
                log.info("Compiling %s, for calls with %d at once.", name, key[0])
                try:
                    kind.codes[key] = compile_it()
                    log.info("Compiled in %.1f s.", time.perf_counter() - start)
                except CannotCompileError as error:
                    kind.codes[key] = None
                    self.warn(f"{name}: {error}")
            return kind.codes[key]

    def warn(self, reason: str) -> None:
        """Warn once that a part runs uncompiled. reason: in words."""
        if not self._warned:
            log.warning("Decoding is not all compiled, and runs as without: %s", reason)
        self._warned = True


def tensors_of(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Return a module's parameters and buffers, each with its owner and its name there."""
    parts = (part for _, part in module.named_modules(remove_duplicate=False))
    return [
        (part, name, tensor)
        for part in parts
        for table in (part._parameters, part._buffers)
        for name, tensor in table.items()
        if tensor is not None
    ]


def _parts(module: nn.Module) -> list[Any]:
    """What makes the code of a module, beside its weights."""
    return [
        (
            name,
            type(part),
            type(part).forward,
            {n: _open(v) for n, v in part.__dict__.items() if n not in _COMMON},
        )
        for name, part in module.named_modules(remove_duplicate=False)
    ]


def _layout(module: nn.Module) -> list[Any]:
    """How the weights of a module lie."""
    return [
        (name, t.shape, t.stride() if t.layout == torch.strided else t.layout, t.dtype, t.device)
        for _, name, t in tensors_of(module)
    ]


def _open(value: Any) -> Any:
    """What can be compared: a partial function and a module without weights cannot."""
    if isinstance(value, dict):
        return {name: _open(each) for name, each in value.items()}
    if isinstance(value, partial):
        return value.func, value.args, value.keywords
    if isinstance(value, nn.Module) and not tensors_of(value):
        return _parts(value)
    return value


def _equal(one: list[Any], other: list[Any]) -> bool:
    try:
        return one == other
    except (RuntimeError, TypeError, ValueError):  # of tensors, which have no one answer
        return False
