"""Confidence scores: how safe it is to exit early. In [0, 1], larger is safer.

One direction, always: a token exits iff `score >= threshold`. `SCORES` read one exit's logits,
`FEATURE_SCORES` hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from offramp.core.decoding.scores import SCORES
from offramp.core.errors import InputError
from offramp.core.plugins import check_registered

if TYPE_CHECKING:
    from torch import Tensor  # policies are read where there is no PyTorch

FEATURE_SCORES: dict[str, Callable[[Any], Tensor]] = {}
"""Registered scores [B] of a whole exit check (`offramp.core.engine.heads.ExitCheck`) by name: of
hidden states, position or previous token. Those that do not ask for logits run no LM head."""

HEADS: dict[str, Callable[..., Any]] = {}
"""Registered confidence that no score of one exit can express, by name: a factory that is called
as `offramp.core.engine.heads.ExitHeads` is, and returns a subclass of it."""


def check_score(name: str) -> str:
    """Return the name of a known score; raise `InputError` with the known names for any other."""
    check_registered("Score", "scores", name, lambda: (*SCORES, *FEATURE_SCORES, *HEADS))
    return name


def check_numbers(by_depth: dict[int, float]) -> dict[int, float]:
    """Return numbers by depth; raise `InputError` for a value that is neither number nor None."""
    wrong = {d: n for d, n in by_depth.items() if n is not None and math.isnan(_number(n))}
    if wrong:
        raise InputError(f"{wrong} holds what is no number.", "Give numbers, such as {2: 0.95}.")
    return by_depth


def check_thresholds(thresholds: dict[int, float], depths: tuple[int, ...]) -> dict[int, float]:
    """Return thresholds by depth; raise `InputError` for a depth without an exit or a threshold
    outside [0, 1].

    A depth left out, or None, is an exit switched off: the exit is not even computed.
    """
    wrong = [d for d in thresholds if d not in depths]
    if wrong:
        raise InputError(
            f"Thresholds name depths {wrong}, where no exit stands.",
            f"Exits stand at {list(depths)}.",
        )
    return check_levels(thresholds)


def check_levels(thresholds: dict[int, float]) -> dict[int, float]:
    """Return levels by depth without those that are None; raise `InputError` for a value that is no
    number in [0, 1]."""
    on = {d: _number(t) for d, t in check_numbers(thresholds).items() if t is not None}
    off = {d: thresholds[d] for d, t in on.items() if not 0.0 <= t <= 1.0}
    if off:
        raise InputError(
            f"Thresholds {off} are outside [0, 1].",
            "Give numbers from 0 (always exit) to 1, or None to switch an exit off.",
        )
    return dict(sorted(on.items()))


def check_trust(trust: float | None) -> None:
    """Raise `InputError` where `trust` is neither None nor a finite number from 0."""
    if trust is not None and (isinstance(trust, bool) or not 0.0 <= _number(trust) < math.inf):
        raise InputError(
            f"A trust of {trust!r} is no number from 0.",
            "Give one from 0 (full answers are always taken) to 1, or mode='lossless'.",
        )


def _number(value: object) -> float:
    """`value` as a float, NaN where it is no number, which is in no range; text is none."""
    if isinstance(value, str):
        return math.nan
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan
