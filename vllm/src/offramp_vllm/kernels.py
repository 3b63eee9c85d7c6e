"""Kernels that vLLM has and does not take by itself where it runs eagerly on a processor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def take_kernels(model: nn.Module, *, quantised: bool = False) -> None:
    """Have a model's attention called without PyTorch's dispatcher, which only a compiler needs,
    and on a processor its float32 norms by one kernel each. In half precision, and before states
    are rounded for quantised weights, that kernel's last digits would make other answers than
    vLLM's own."""
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.platforms import current_platform

    for module in model.modules():
        if getattr(module, "use_direct_call", None) is False:
            module.use_direct_call = True
        plain = type(module) is RMSNorm and module.has_weight
        plain = plain and module.weight.dtype == torch.float32 and not quantised
        if plain and module.variance_size_override is None and current_platform.is_cpu():
            module._forward_method = _Norm(module, module._forward_method)


class _Norm:
    """Root mean square norm in place, as on GPUs."""

    def __init__(self, module: Any, theirs: Callable[..., Any]) -> None:
        self._weight, self._least = module.weight.data, module.variance_epsilon
        self._theirs = theirs

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if x.dim() != 2 or x.dtype != self._weight.dtype or not x.is_contiguous():
            return self._theirs(x, residual)
        if residual is None:
            out = torch.empty_like(x)
            torch.ops._C.rms_norm(out, x, self._weight, self._least)
            return out
        torch.ops._C.fused_add_rms_norm(x, residual, self._weight, self._least)
        return x, residual


class Keys:
    """Writes the keys and values of a layer, and runs nothing of the layer after that."""

    def __init__(self, attention: Any) -> None:
        self._attention = attention

    @classmethod
    def of(cls, layer: nn.Module) -> Keys | None:
        """None where the layer's attention does not write them by a call of its own."""
        found: list[Any] = [one for one in layer.modules() if hasattr(one, "use_direct_call")]
        if len(found) != 1 or found[0].attn_backend.forward_includes_kv_cache_update:
            return None
        return None if found[0].kv_sharing_target_layer_name else cls(found[0])

    def write(self, run: Callable[[], Any]) -> None:
        """Write those of a call. run: calls the layer."""
        self._attention.forward = self._only
        try:
            run()
        except _Written:
            pass
        finally:
            del self._attention.forward

    def _only(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any) -> Tensor:
        from vllm.model_executor.layers.attention.attention import unified_kv_cache_update

        one = self._attention
        keys = key.view(-1, one.num_kv_heads, one.head_size)
        values = value.view(-1, one.num_kv_heads, one.head_size_v)
        unified_kv_cache_update(keys, values, one.layer_name)
        raise _Written


class _Written(Exception):
    pass


def product_of(lm_head: Any, ids: Tensor, vocabulary: int) -> Callable[[Tensor], Tensor] | None:
    """The product with the head's rows of tokens [S], as vLLM makes products on this platform:
    states [A, D] to logits [A, S]. None where the rows cannot be taken."""
    from vllm.distributed import get_tp_group
    from vllm.model_executor.layers.utils import (
        dispatch_cpu_unquantized_gemm,
        dispatch_unquantized_gemm,
    )
    from vllm.platforms import current_platform

    weight, bias = getattr(lm_head, "weight", None), getattr(lm_head, "bias", None)
    if weight is None or not weight.is_floating_point() or weight.itemsize == 1:
        return None  # quantised
    if get_tp_group().world_size > 1 or len(weight) < vocabulary:
        return None
    rows = nn.Linear(1, 1, bias=bias is not None, device="meta").requires_grad_(False)
    rows.weight = nn.Parameter(weight[ids].clone(), requires_grad=False)
    if bias is not None:
        rows.bias = nn.Parameter(bias[ids].clone(), requires_grad=False)
    if current_platform.is_cpu():
        dispatch_cpu_unquantized_gemm(rows, remove_weight=False)
    made = dispatch_unquantized_gemm()
    return lambda states: made(rows, states, rows.weight, rows.bias)
