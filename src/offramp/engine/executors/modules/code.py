"""Machine code of a call over a few rows, by inductor; weights are arguments of it.

So modules that are built alike share one piece of code. Products with few rows are sums over each
row of the weights: at the speed of memory, which the libraries behind PyTorch do not reach for one
row, and reading the weights once for all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MOST_ROWS = 8
"""Of more rows the libraries' products are as fast."""

_OPTIONS = {"size_asserts": False, "alignment_asserts": False}


class CannotCompileError(Exception):
    """There is no code for this call; the module itself must run."""


class Code:
    """What `run` computes. Called with inputs and weights; what it writes into inputs stays."""

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
        """Whether the code was made for such inputs too; asked once for each tuple of lengths."""
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
    from torch.fx.experimental.symbolic_shapes import (
        DimDynamic,
        ShapeEnv,
        StatelessSymbolicContext,
    )

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
