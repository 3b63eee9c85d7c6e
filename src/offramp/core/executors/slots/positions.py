"""Where a family counts positions from one cache length for all rows: each token's own, instead."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from offramp.core.executors.slots.cache import Call, CurrentCall
from offramp.core.models.backbone import Backbone


class RelativeBias:
    """T5's attention bias, by the distance of a key behind its query."""

    def __init__(self, backbone: Backbone) -> None:
        self._attention = backbone.layers[0].layer[0].SelfAttention
        self._by_distance: Tensor | None = None  # [columns, heads]
        self._backwards: Tensor | None = None  # [1, heads, 1, columns], the farthest first

    def of(self, call: Call, columns: int) -> Tensor:
        """Return the bias of each query of a call [R, heads, W, K]. columns: of the cache."""
        device = self._attention.relative_attention_bias.weight.device
        if self._by_distance is None or len(self._by_distance) < columns:
            self._by_distance = self._table(torch.arange(columns, device=device))
            self._backwards = self._by_distance.flip(0).t()[None, :, None].contiguous()
        if call.beside is not None and call.shape[1] == 1 and call.width == call.beside[1] + 1:
            assert self._backwards is not None  # one query, and the keys up to it: a slice
            return self._backwards.narrow(3, len(self._by_distance) - call.width, call.width)
        distance = call.queries[..., None] - torch.arange(call.width, device=device)
        return self._by_distance[distance.clamp_(min=0)].permute(0, 3, 1, 2)  # later: masked

    def _table(self, distance: Tensor) -> Tensor:
        of = self._attention
        bucket = of._relative_position_bucket(
            -distance,
            bidirectional=False,
            num_buckets=of.relative_attention_num_buckets,
            max_distance=of.relative_attention_max_distance,
        )
        return of.relative_attention_bias(bucket)  # type: ignore[no-any-return]


class ColumnPositions(nn.Module):
    """BART's learned positions of the current call's columns."""

    def __init__(self, embed: nn.Module, current: CurrentCall) -> None:
        super().__init__()
        self.__dict__.update(_embed=embed, _current=current)

    def __call__(self, input_ids: Any, *_: Any, **__: Any) -> Tensor:
        call: Call = self.__dict__["_current"].call
        positions: Tensor = self.__dict__["_embed"](input_ids, 0, position_ids=call.columns)
        return positions.view(*call.shape, -1)
