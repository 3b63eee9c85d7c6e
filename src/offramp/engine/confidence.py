"""Confidence scores: how safe it is to exit early. In [0, 1], larger is safer.

One direction, always: a token exits iff `score >= threshold`. Every score is computed in float32,
where entropy cannot become NaN. `SCORES` read one exit's logits, `STREAKS` also at what the
exits before it said of the same token, and `FEATURE_SCORES` at hidden states alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from offramp.errors import InputError, did_you_mean
from offramp.plugins import check_registered

if TYPE_CHECKING:
    from torch import Tensor  # policies are read where there is no PyTorch


def max_probability(logits: Tensor) -> Tensor:
    """The largest probability [B] of logits [B, V]."""
    return logits.float().softmax(-1).amax(-1)


def margin(logits: Tensor) -> Tensor:
    """The largest minus the second largest probability [B] of logits [B, V]."""
    top = logits.float().softmax(-1).topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]


def entropy(logits: Tensor) -> Tensor:
    """1 - H(p) / log V [B] of logits [B, V]: 1 when certain, 0 when uniform."""
    log_p = logits.float().log_softmax(-1)
    # p = 0 gives log p = -inf and 0 * -inf = NaN; its true contribution to the entropy is 0.
    terms = (log_p.exp() * log_p).masked_fill(log_p.isneginf(), 0.0)
    return (1.0 + terms.sum(-1) / math.log(logits.shape[-1])).clamp(0.0, 1.0)


class Streak:
    """Adds up, row by row, what consecutive exits bring that choose the same token.

    An exit that chooses another one starts over; so does every new token, at the first exit.
    """

    def __init__(self, first: int) -> None:
        """first: depth of the first exit."""
        self._first = first
        self._chosen: Tensor
        self._sum: Tensor

    def add(self, depth: int, logits: Tensor, gain: Tensor) -> Tensor:
        """The sum [B] so far, with `gain` [B] of the exit at `depth` and its logits [B, V]."""
        chosen = logits.argmax(-1)
        if depth != self._first:
            gain = gain + self._sum.masked_fill(chosen != self._chosen, 0.0)
        self._chosen, self._sum = chosen, gain
        return gain


class Agreement:
    """Confidence that agreeing exits gather (BEEM, Bajpai and Hanawal 2025).

    The sum of w_i * p_i over this exit and those just before it that choose its token, one after
    the other, over the sum of w_i over all exits that are on. p_i is the largest probability
    of exit i and w_i its weight, e.g. its accuracy. Only exits that all agree, each of them
    certain, reach 1, and the first exit reaches its own share of the weights.
    """

    def __init__(self, depths: Sequence[int], weights: Mapping[int, float]) -> None:
        """depths: of the exits that are on. weights: by depth; empty: all count alike.

        Raises:
            InputError: weights leave out one of these exits, or are all 0 there.
        """
        missing = [d for d in depths if weights and d not in weights]
        if missing:
            raise InputError(
                f"Weights are given for depths {list(weights)}, but not for {missing}.",
                "Give a weight to each depth with a threshold, or none at all.",
            )
        total = sum(weights.get(d, 1.0) for d in depths)
        if total == 0:
            raise InputError(
                f"The weights of depths {list(depths)}, where tokens may exit, are all 0.",
                "Give at least one of them a weight above 0, e.g. the exit's accuracy.",
            )
        self._streak = Streak(min(depths))
        self._shares = {d: weights.get(d, 1.0) / total for d in depths}

    def __call__(self, depth: int, logits: Tensor) -> Tensor:
        """The score [B] of logits [B, V] at `depth`; call with one token's exits in order."""
        return self._streak.add(depth, logits, self._shares[depth] * max_probability(logits))


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "max_probability": max_probability,
    "margin": margin,
    "entropy": entropy,
}
"""Scores [B] of one exit's logits [B, V] by name."""

STREAKS: dict[str, Callable[[Sequence[int], Mapping[int, float]], Callable[..., Tensor]]] = {
    "agreement": Agreement,
}
"""Scores over the exits of one token by name: built from depths and weights, then called with each
exit's depth and logits [B, V] in order of depth."""

FEATURE_SCORES: dict[str, Callable[[Any], Tensor]] = {}
"""Registered scores [B] of a whole exit check (`offramp.engine.exit_check.ExitCheck`) by name: of
hidden states, position or previous token. Those that do not ask for logits run no LM head."""

ROUNDING = 1e-3
"""By which a score may miss [0, 1]: half precision's."""
_BUILT_IN = frozenset((*SCORES, *STREAKS))
_REGISTRIES: dict[str, dict[str, Any]] = {
    "logits": SCORES,
    "exits": STREAKS,
    "check": FEATURE_SCORES,
}


def register_score(name: str, score: Callable[..., Any], *, reads: str = "logits") -> None:
    """Give a confidence score a name that policies, calibration and the command line know.

    score: to [B] in [0, 1], larger is safer. What it takes is said by `reads`:

    - "logits": one exit's logits [B, V].
    - "exits": it is made anew for each token's walk over the exits, from the depths that are on and
      the policy's weights by depth, and then called with each exit's depth and logits [B, V].
    - "check": an `ExitCheck`: `state`, `entry`, `features` and, one decoder layer before the entry,
      `previous`, all [B, D]; `logits` [B, V], `depth`, `position` [B] in the answer from 0,
      `previous_token` [B]; `exits`, whose discriminators it may ask. Calibration then decodes
      instead of replaying, as with "exits".

    Raises:
        InputError: the name is a built-in score's, or `reads` is none of these. Where the score is
            first asked: what it gives is not [B] in [0, 1].
    """
    if name in _BUILT_IN:
        raise InputError(f"{name!r} is a built-in score.", "Register yours under another name.")
    if reads not in _REGISTRIES:
        raise InputError(f"A score cannot read {reads!r}.", did_you_mean(str(reads), _REGISTRIES))
    first = _FirstScores(name)

    def of_logits(logits: Tensor) -> Tensor:
        return first(score(logits), logits.shape[:-1])

    def of_exits(depths: Sequence[int], weights: Mapping[int, float]) -> Callable[..., Tensor]:
        walk = score(depths, weights)
        return lambda depth, logits: first(walk(depth, logits), logits.shape[:-1])

    def of_check(check: Any) -> Tensor:
        return first(score(check), check.entry.shape[:1])

    looked_at = {"logits": of_logits, "exits": of_exits, "check": of_check}
    _REGISTRIES[reads][name] = looked_at[reads]


class _FirstScores:
    """Looks at the first scores that a registered one gives: at each token's it would cost time."""

    def __init__(self, name: str) -> None:
        self._name, self._seen = name, False

    def __call__(self, scores: Tensor, shape: Sequence[int]) -> Tensor:
        """`scores`; raise `InputError` where they are not of this shape and in [0, 1], to
        rounding."""
        if self._seen:
            return scores
        found: Any = getattr(scores, "shape", None)
        if found is None or tuple(found) != tuple(shape):
            what = type(scores).__name__ if found is None else f"shape {list(found)}"
            raise InputError(
                f"The score {self._name!r} gave {what} for {list(shape)} tokens.",
                f"Return a tensor of shape {list(shape)}, a number for each token.",
            )
        outside = scores[~((scores >= -ROUNDING) & (scores <= 1 + ROUNDING))]
        if len(outside):
            raise InputError(
                f"The score {self._name!r} gave {float(outside[0]):g}, outside [0, 1].",
                "Scale it: 0 where nothing is sure, 1 where all is.",
            )
        self._seen = True
        return scores


def check_score(name: str) -> str:
    """`name`, or `InputError` with the names there are, those of plug-ins included."""
    check_registered("Score", name, lambda: (*SCORES, *STREAKS, *FEATURE_SCORES))
    return name


def check_numbers(by_depth: dict[int, float]) -> dict[int, float]:
    """What is given by depth; raise `InputError` for what is neither a number nor None."""
    wrong = {d: n for d, n in by_depth.items() if n is not None and math.isnan(_number(n))}
    if wrong:
        raise InputError(f"{wrong} holds what is no number.", "Give numbers, such as {2: 0.95}.")
    return by_depth


def check_weights(
    weights: Mapping[int, float], depths: Sequence[int] | None = None
) -> dict[int, float]:
    """`weights` by depth; raise `InputError` for one below 0 or not finite, or if all are 0.

    depths: where exits stand, if that is known yet; a weight elsewhere raises too.
    """
    off = {d: w for d, w in weights.items() if not 0.0 <= _number(w) < math.inf}
    checked = {d: _number(w) for d, w in weights.items()}
    if off or (checked and not any(checked.values())):
        raise InputError(
            f"Weights {off} are not finite numbers from 0." if off else "All weights are 0.",
            "Give each exit a weight from 0, e.g. its accuracy, and at least one above 0.",
        )
    wrong = [d for d in checked if depths is not None and d not in depths]
    if wrong:
        raise InputError(
            f"Weights name depths {wrong}, where no exit stands.",
            f"Exits stand at {list(depths or ())}.",
        )
    return checked


def check_thresholds(thresholds: dict[int, float], depths: tuple[int, ...]) -> dict[int, float]:
    """`thresholds` by depth; raise `InputError` for a depth without an exit or a value off [0, 1].

    A depth left out, or None, is an exit switched off: it is not even computed.
    """
    wrong = [d for d in thresholds if d not in depths]
    if wrong:
        raise InputError(
            f"Thresholds name depths {wrong}, where no exit stands.",
            f"Exits stand at {list(depths)}.",
        )
    on = {d: _number(t) for d, t in sorted(thresholds.items()) if t is not None}
    off = {d: thresholds[d] for d, t in on.items() if not 0.0 <= t <= 1.0}
    if off:
        raise InputError(
            f"Thresholds {off} are outside [0, 1].",
            "Give numbers from 0 (always exit) to 1, or None to switch an exit off.",
        )
    return on


def _number(value: object) -> float:
    """`value` as a float, NaN where it is no number, which is in no range; text is none."""
    if isinstance(value, str):
        return math.nan
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan
