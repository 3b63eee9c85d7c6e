"""The cost model: what decoding takes on this machine, predicted from its measured parts.

A token costs what is fixed, the layers it runs, the checks it meets, and the LM head; past an exit
the layers above are a call of their own. With exact keys and values (`recompute`) a token that goes
deeper takes the pending ones along, and a layer over n positions costs little more than over one,
because its weights are read once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from offramp.core.errors import InputError

LENGTHS = (1, 2, 4, 8)
"""Positions run at once for which layers and head are timed."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Costs:
    """Seconds for the parts of one decoded token.

    layers: number of decoder layers L. batch: rows decoded together. context: tokens in the cache.
    layer, head: one decoder layer, and the LM head, over 1, 2, 4 and 8 positions of each row.
    exit: an exit's own layer, over one position.
    check: the rest of a check: norm, head, score, and the transfer of its verdict.
    score: the score of given logits; part of `check`.
    token: everything besides layers and head: embedding, masks, Python.
    reenter: the extra cost of a call of the layers after an exit, for a token that did not exit and
    those pending there.
    """

    layers: int
    batch: int
    context: int
    layer: tuple[float, ...]
    head: tuple[float, ...]
    exit: float
    check: float
    score: float
    token: float
    reenter: float

    def __post_init__(self) -> None:
        for name in ("layer", "head"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        counts = {n: getattr(self, n) for n in ("layers", "batch", "context")}
        seconds = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in counts}
        wrong = [n for n, v in counts.items() if v < 1]
        wrong += [
            n for n, v in seconds.items() if not np.all(np.isfinite(v) & (np.array(v) >= 0.0))
        ]
        wrong += [n for n in ("layer", "head") if len(seconds[n]) != len(LENGTHS)]
        if self.layers < 2 or wrong:
            raise InputError(
                f"Costs do not hold together ({', '.join(wrong) or 'fewer than two layers'}).",
                "Measure them again with measure_costs.",
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Costs:
        """Return the costs that `to_json` wrote."""
        names = {f.name for f in fields(cls)}
        older = ("leave", "gate", "store")  # parts that earlier versions timed
        value = {n: v for n, v in value.items() if n not in older}
        if set(value) != names:
            raise InputError(
                f"These are no costs: {', '.join(sorted(names ^ set(value)))} missing or unknown.",
                "Give what Costs.to_json wrote.",
            )
        return cls(**value)

    @property
    def full(self) -> float:
        """Seconds of a token at full depth, without exits."""
        return self.token + self.layers * self.layer[0] + self.head[0]


def layer_seconds(costs: Costs, positions: ArrayLike) -> Array:
    """Return the seconds of one layer over so many positions: linear between the measured ones, and
    beyond."""
    return _over(costs.layer, positions)


def _over(table: Sequence[float], positions: ArrayLike) -> Array:
    n = np.asarray(positions, dtype=float)
    slope = max(0.0, (table[-1] - table[-2]) / (LENGTHS[-1] - LENGTHS[-2]))
    return np.asarray(np.interp(n, LENGTHS, table) + slope * np.maximum(n - LENGTHS[-1], 0.0))


# -- predictions ------------------------------------------------------------------------------


def token_seconds(costs: Costs, depths: ArrayLike, exits: Sequence[int]) -> Array:
    """Return the seconds of decoding sequences with known depths, which also tell the pending
    states.

    depths: [A, N] (or [N]) depths of the decoded tokens of A sequences, each decoded on its own, 0
    after its end. Leave out the first token of an answer, which comes from the prefill.
    exits: depths of the exits in use; a token meets every one up to where it exits.

    Returns [A] (or a scalar array).

    Raises:
        InputError: a depth that is neither an exit's nor L.
    """
    ran = np.atleast_2d(np.asarray(depths, dtype=int))
    on = sorted(exits)
    if unknown := set(np.unique(ran).tolist()) - {0, costs.layers, *on}:
        raise InputError(
            f"Tokens left at depths {sorted(unknown)}, where no exit is on.",
            f"Exits are on at {on}; the full depth is {costs.layers}.",
        )
    live = ran > 0
    seconds = live.sum(1) * costs.token
    arrived, start = live, 0
    together = live.astype(int)  # positions that each token runs with, itself included
    for depth in (*on, costs.layers):
        run = np.where(arrived, layer_seconds(costs, np.maximum(together, 1)), 0.0).sum(1)
        seconds += run * (depth - start)
        if depth == costs.layers:
            break
        passed = ran > depth
        checked = np.where(arrived, layer_seconds(costs, np.maximum(together, 1)), 0.0).sum(1)
        seconds += checked * costs.exit / costs.layer[0] + arrived.sum(1) * costs.check
        seconds += passed.sum(1) * costs.reenter
        together = _since(passed, live)
        arrived, start = passed, depth
    seconds += arrived.sum(1) * costs.head[0]
    return np.asarray(seconds if np.ndim(depths) > 1 else seconds[0])


def _since(passed: NDArray[np.bool_], counted: NDArray[np.bool_]) -> NDArray[np.int_]:
    """For each token that passed, how many were counted since the one before it that passed.

    Itself included; 0 for those that did not pass.
    """
    seen = counted.cumsum(1)
    at_last = np.maximum.accumulate(np.where(passed, seen, 0), 1)
    before = np.concatenate([np.zeros_like(seen[:, :1]), at_last[:, :-1]], 1)
    return np.where(passed, seen - before, 0)
