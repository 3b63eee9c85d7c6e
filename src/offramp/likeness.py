"""Whether a request is like those that were calibrated: by how sure exits were of its answer.

A guarantee is of images and prompts like the calibrated ones, and answers themselves show where
they are not: exits that know their images from training are unsure of others. Of each calibrated
answer the mean logarithm of its tokens' scores is kept, by kind of prompt. The share of these that
is no larger than a request's is a conformal p-value (Vovk, Gammerman and Shafer 2005): of requests
drawn as the calibrated ones were, at most a share p has one of p or less. It costs nothing, as the
scores are there.

Over many requests, bets are made that more of them are called unlike than of requests drawn so
(`offramp.betting`). With one set of calibrated answers for all requests p-values share its luck
(conditional conformal test martingales: arXiv 2602.13848), so the bets are against the largest rate
that these answers leave possible.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from offramp.betting import Restarts

LIKE = "on images and prompts like those calibrated"
"""What a promise is about; whatever shows one says it."""
UNLIKE = 0.005
"""P-value up to which a request is called unlike those that were calibrated."""
KEPT = 0.05
"""Share of the calibrated answers, the least sure, whose mean scores are kept."""
ANSWERS = 2000
"""Calibrated answers, at most, that are looked at."""
LUCK, LEVEL = 1e-3, 1e-3
"""How often the calibrated answers are so lucky that the bets are not fair, and how often, at most,
the alarm is raised over requests like the calibrated ones, over unlimited time."""
_LEAST = 1e-6


def mean_log_score(scores: Sequence[float]) -> float | None:
    """Return the mean log score of the tokens of an answer that an exit looked at; None where none
    did."""
    seen = [math.log(max(score, _LEAST)) for score in scores if score == score]  # NaN: not looked
    return sum(seen) / len(seen) if seen else None


@dataclass(frozen=True)
class Kept:
    """Scores of the answers to one kind of prompt. n: answers. low: the least of their mean log
    scores, ascending, up to `KEPT` of them."""

    n: int
    low: tuple[float, ...]

    @classmethod
    def of(cls, means: Sequence[float]) -> Kept:
        least = sorted(means)[: math.ceil(KEPT * len(means))]
        return cls(len(means), tuple(round(mean, 5) for mean in least))

    def p_value(self, mean: float) -> float:
        """Return the p-value of "drawn as the calibrated answers were"; 1 where it is none of the
        least."""
        place = bisect_right(self.low, mean)
        return 1.0 if place == len(self.low) else (1 + place) / (1 + self.n)

    @property
    def rate(self) -> float:
        """The largest rate of requests called unlike, drawn as these were, that these leave
        possible but for `LUCK` (Clopper and Pearson 1934)."""
        from scipy.stats import beta

        called = max(0, math.floor(UNLIKE * (self.n + 1)))  # as many are as sure as that, or less
        return float(beta.ppf(1 - LUCK, max(1, called), max(1, self.n - called + 1)))


@dataclass(frozen=True)
class Likeness:
    """Scores of calibrated answers, by kind of prompt (`offramp.prompt_kinds`)."""

    kinds: Mapping[str, Kept]

    @classmethod
    def of(cls, scores: Sequence[Sequence[float]], kinds: Sequence[str]) -> Likeness:
        """Make the likeness of the scores of answers' tokens, and the kinds of their prompts."""
        means: dict[str, list[float]] = {}
        for kind, row in zip(kinds, scores, strict=True):
            mean = mean_log_score(row)
            if mean is not None:
                means.setdefault(kind, []).append(mean)
        return cls({kind: Kept.of(some) for kind, some in sorted(means.items())})

    def p_value(self, kind: str, scores: Sequence[float]) -> float | None:
        """Return the p-value of an answer to a prompt of that kind; None: nothing is known of the
        kind, or no exit looked at the answer, or too few were calibrated to call any unlike."""
        kept, mean = self.kinds.get(kind), mean_log_score(scores)
        if kept is None or mean is None or (kept.n + 1) * UNLIKE < 1:
            return None
        return kept.p_value(mean)

    def to_json(self) -> dict[str, Any]:
        return {kind: {"n": kept.n, "low": list(kept.low)} for kind, kept in self.kinds.items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any] | None) -> Likeness:
        """Return what `to_json` gave; of anything else, one that knows no kind."""
        kinds = {}
        with suppress(TypeError, ValueError, KeyError, AttributeError):
            for kind, kept in (value or {}).items():
                low = tuple(sorted(float(mean) for mean in kept["low"]))
                kinds[str(kind)] = Kept(int(kept["n"]), low)
        return cls(kinds)


class Alarm:
    """Requests that come, and whether more of them are unlike the calibrated ones than by chance.

    compared, unlike: requests so far. raised: for good, until a new one is made.
    """

    def __init__(self, likeness: Likeness) -> None:
        self.compared: int = 0
        self.unlike: int = 0
        rates = [kept.rate for kept in likeness.kinds.values()]
        self._bets = Restarts(min(0.5, max(rates, default=0.5)))

    def add(self, p_value: float) -> bool:
        """Note a request; whether it is called unlike."""
        called = p_value <= UNLIKE
        self.compared += 1
        self.unlike += called
        self._bets.add(float(called))
        return called

    @property
    def raised(self) -> bool:
        return bool(self._bets.most >= 1 / LEVEL)
