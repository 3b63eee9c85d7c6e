"""Rows of a batch that are still written: the stack runs on them alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Rows:
    """Which rows of a batch of `total` are kept, and the way there and back.

    kept: their indices [b], or None while all are.
    """

    def __init__(self) -> None:
        self.total: int | None = None
        self.kept: Tensor | None = None

    def keep(self, written: Tensor, live: int) -> Tensor | None:
        """Keep the rows `written` [B] alone, the last one in any case.

        live: how many are unfinished; looked at first, for `written` costs a transfer. Returns
        which of those kept so far stay, None where all do.
        """
        self.total = len(written)
        count = self.total if self.kept is None else len(self.kept)
        if live == count:
            return None
        stay = self.pick(written).nonzero()[:, 0]
        if len(stay) in (0, count):
            return None
        self.kept = stay if self.kept is None else self.kept[stay]
        return stay

    def pick(self, value: Tensor) -> Tensor:
        """The kept rows of all [B, ...]."""
        return value if self.kept is None else value[self.kept]

    def pick_arguments(self, kw: dict[str, Any]) -> dict[str, Any]:
        """A stack's arguments for the kept rows: of tensors and masks, what has all rows."""
        if self.kept is None:
            return kw
        picked = dict(kw)
        for name, value in kw.items():
            dim = -2 if name == "position_ids" else 0  # these may have an axis before the rows
            if isinstance(value, dict):
                picked[name] = self.pick_arguments(value)
            elif isinstance(value, Tensor) and value.dim() > 1 and value.shape[dim] == self.total:
                picked[name] = value.index_select(dim, self.kept)
        return picked

    def spread(self, value: Tensor, fill: float) -> Tensor:
        """Back to all rows [B, ...]; those that are not kept are `fill`."""
        if self.kept is None:
            return value
        assert self.total is not None
        whole = value.new_full((self.total, *value.shape[1:]), fill)
        return whole.index_copy_(0, self.kept, value)

    def gathered(self, whole: Any) -> Any:
        """A function of the kept rows' logits [b, V] out of one of all rows', `whole`."""
        if self.kept is None or whole is None:
            return whole
        return lambda logits: whole(self.spread(logits, 0.0))[self.kept]
