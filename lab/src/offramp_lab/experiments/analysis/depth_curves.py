"""What a replay of known answers says about depth: quality by depth, dips, and tokens gone wrong.

A token is overthought when some exit has it right and the final layer wrong (Kaya et al. 2019). A
dip, or mid-crisis, is a fall of quality from one depth to a deeper one. Every share comes with a
bootstrap interval over images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from offramp.calibration.replay import Array, Replay
from offramp.evaluation.statistics import by_group
from offramp_lab.experiments.statistics import Bootstrap


def share(hits: Array, mask: Array) -> Array:
    """Sums [N, 2] of a share of tokens: hits among `mask`, and `mask`, both [N, A]."""
    return np.stack([(hits & mask).sum(1), mask.sum(1)], 1)


# -- quality by depth ------------------------------------------------------------------------------


def right_by_depth(replay: Replay, wanted: Array) -> dict[int, Array]:
    """Where [N, A] each depth says the `wanted` token, the full depth last."""
    return {d: said == wanted for d, said in {**replay.said, replay.layers: replay.final}.items()}


def curve(replay: Replay, wanted: Array, draws: Bootstrap) -> dict[str, Any]:
    """Token accuracy against `wanted` [N, A] at each depth; see `by_depth`."""
    right = right_by_depth(replay, wanted).items()
    hits = {depth: (hits & replay.mask).sum(1) for depth, hits in right}
    return by_depth(hits, replay.mask.sum(1), draws)


def by_depth(hits: Mapping[int, Array], counts: Array, draws: Bootstrap) -> dict[str, Any]:
    """A share at each depth: `depths`, `values` and its `dip`.

    hits: what each example adds [N], by depth, ascending. counts: and of how many [N].
    """
    columns = list(hits.values())
    return {
        "depths": list(hits),
        "values": [draws.estimate(np.stack([column, counts], 1)) for column in columns],
        "dip": dip(list(hits), np.stack(columns, 1), counts, draws),
    }


def dip(depths: Sequence[int], hits: Array, counts: Array, draws: Bootstrap) -> dict[str, Any]:
    """The largest fall of a curve from one depth to a deeper one.

    The pair of depths is picked because its fall is the largest, so its interval is simultaneous
    over all pairs; see `Bootstrap.simultaneous`.

    Args:
        depths: of the K points of the curve, ascending.
        hits, counts: what each example adds [N, K] and [N].

    Returns:
        `fall` (0 where the curve never falls), `low`, `high`, `from_depth`, `to_depth`, and
        `found`: whether the interval is above 0.
    """
    sums = by_group(np.column_stack([hits, counts]), draws.groups)
    above = np.triu_indices(len(depths), 1)

    def falls(sums: Array) -> Array:
        values = sums[..., :-1] / sums[..., -1:]
        fallen: Array = values[..., above[0]] - values[..., above[1]]
        return fallen

    observed = falls(sums.sum(0))
    best = int(observed.argmax())
    none = {"fall": 0.0, "low": None, "high": None, "from_depth": None, "to_depth": None}
    if observed[best] <= 0:
        return {**none, "found": False}
    low, high = draws.simultaneous(sums, falls, best) or (None, None)
    return {
        "fall": float(observed[best]),
        "low": low,
        "high": high,
        "found": low is not None and low > 0,
        "from_depth": int(depths[above[0][best]]),
        "to_depth": int(depths[above[1][best]]),
    }


# -- overthinking ----------------------------------------------------------------------------------


def overthinking(replay: Replay, draws: Bootstrap) -> dict[str, Any]:
    """How often early depths and the final layer are right and wrong, on labelled answers.

    Returns:
        `tokens`; `final`, the accuracy of the final layer; `oracle`, right at any depth; and three
        sets of tokens, each with its size `n` and its `share`: `overthought` (some early depth
        right, final wrong), `at_risk` (final right, some early depth wrong), `only_final` (final
        right, every early depth wrong); `by_depth`: tokens that exiting there would mend and
        spoil.
    """
    right = right_by_depth(replay, replay.targets)
    final = right.pop(replay.layers)
    early = np.stack(list(right.values()))
    sets = {
        "overthought": early.any(0) & ~final,
        "at_risk": final & ~early.all(0),
        "only_final": final & ~early.any(0),
    }
    return {
        "tokens": int(replay.mask.sum()),
        "final": draws.estimate(share(final, replay.mask)),
        "oracle": draws.estimate(share(final | early.any(0), replay.mask)),
        **{
            name: {
                "n": int((hits & replay.mask).sum()),
                "share": draws.estimate(share(hits, replay.mask)),
            }
            for name, hits in sets.items()
        },
        "by_depth": [
            {
                "depth": depth,
                "mended": int((hits & ~final & replay.mask).sum()),
                "spoiled": int((~hits & final & replay.mask).sum()),
            }
            for depth, hits in right.items()
        ],
    }


def overthought(replay: Replay) -> Array:
    """Which tokens [N, A] some early depth has right and the final layer wrong."""
    early = np.stack([said == replay.targets for said in replay.said.values()])
    return early.any(0) & (replay.final != replay.targets) & replay.mask  # type: ignore[no-any-return]


def by_policy(replay: Replay, depths: Array, draws: Bootstrap, subset: Array) -> dict[str, Any]:
    """Accuracy on labelled tokens when each exits at its depth of `depths` [N, A].

    subset: tokens [N, A] that are overthought.

    Returns:
        `accuracy`, `difference` (minus the final layer's), `mean_depth`, and the same accuracy on
        the tokens of `subset`: `on_overthought`, with `final_on_overthought`, which is 0 by
        the definition of that set.
    """
    right, final = replay.written(depths) == replay.targets, replay.final == replay.targets
    return {
        "accuracy": draws.estimate(share(right, replay.mask)),
        "difference": draws.estimate(share(right, replay.mask), share(final, replay.mask)),
        "mean_depth": float(depths[replay.mask].mean()),
        "n_overthought": int(subset.sum()),
        "on_overthought": draws.estimate(share(right, subset)),
        "final_on_overthought": draws.estimate(share(final, subset)),
    }
