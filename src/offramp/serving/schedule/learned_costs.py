"""What an engine's calls take, learned from those that it makes."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from statistics import mean, median

from offramp.serving.schedule.unit_costs import TOKENS, CallCosts, Table

LAST = 3
"""Calls of one kind and size whose median counts: one that was disturbed does not matter."""
ENOUGH = 2
BESIDE = 32
"""Tokens of a deep call that take as long as the call itself, until that is seen."""
LATELY = 100
"""Calls of a kind; a size that none of them had is forgotten."""


@dataclass
class _Size:
    """The last calls of one kind and size: (tokens, seconds). number: of the last, of its kind."""

    took: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=LAST))
    number: int = 0


class LearnedCosts:
    """Seconds of calls by kind and by the size of `TOKENS` that is nearest to their tokens."""

    def __init__(self) -> None:
        self._sizes: dict[tuple[str, int], _Size] = {}
        self._calls: Counter[str] = Counter()

    def note(self, kind: str, tokens: int, seconds: float) -> None:
        """A call over `tokens` tokens took so long."""
        self._calls[kind] += 1
        size = self._sizes.setdefault((kind, nearest(tokens)), _Size())
        size.took.append((tokens, seconds))
        size.number = self._calls[kind]

    def table(self, kind: str) -> Table:
        """(tokens, seconds) of that kind."""
        since = self._calls[kind] - LATELY
        sizes = [
            (round(mean(n for n, _ in size.took)), median(s for _, s in size.took))
            for (of, _), size in self._sizes.items()
            if of == kind and size.number > since and len(size.took) >= ENOUGH
        ]
        return tuple(sorted(sizes))

    def calls(self, rows: int) -> CallCosts:
        """For the simulator; the LM head is counted with the deep calls that it was read in.

        Of deep calls smaller than any that was seen, `BESIDE` says what they take: else nothing
        would speak for making them.
        """
        shallow, deep, full = (self.table(kind) for kind in ("shallow", "deep", "full"))
        least, took = deep[0]
        if least > 1:
            deep = ((1, took * (BESIDE + 1) / (BESIDE + least)), *deep)
        return CallCosts(rows, 0, shallow, deep, ((1, 0.0),), full, 0.0)


def nearest(tokens: int) -> int:
    """The size of `TOKENS` that is nearest by ratio."""
    return min(TOKENS, key=lambda size: max(size / tokens, tokens / size))
