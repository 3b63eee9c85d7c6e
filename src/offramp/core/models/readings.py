"""What a model found when it read answers again, by the shape of what was asked."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass, field

OWN = "own"
"""The verdict on answers that the model's own forward pass writes."""


@dataclass(eq=False)
class Readings:
    """Verdicts on the answers of one model as it is; it has new ones once it changes.

    verdicts: by shape, the executor whose answers were right, or `OWN`. longest: by shape, tokens
    of the longest answer that was right. read, failed: answers that
    were read again, and that were not the model's own. why: of those that failed, each reason once.
    marks: tokens that stand for images and the like, once they are known.
    """

    verdicts: dict[Hashable, str] = field(default_factory=dict)
    longest: dict[Hashable, int] = field(default_factory=dict)
    read: int = 0
    failed: int = 0
    why: list[str] = field(default_factory=list)
    marks: frozenset[int] | None = None
    _answers: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def words(self) -> str:
        """Return what was found in one line, for people."""
        why = f": {self.why[0]}" if self.why else ""
        return f"{self.read} answers read again by the model, {self.failed} not its own{why}"

    def __reduce__(self) -> tuple[type[Readings], tuple[()]]:
        return Readings, ()  # a model's copy, here or in another process, reads for itself

    def due(self, share: float) -> bool:
        """Return True if one more answer is of the share that is read again: every hundredth of a
        share of .01, so that the same answers are read in every run."""
        with self._lock:
            self._answers += 1
            return int(self._answers * share) > int((self._answers - 1) * share)

    def note(self, shape: Hashable, verdict: str, tokens: int) -> None:
        """Note that an answer of so many tokens was read again and was right."""
        with self._lock:
            self.read += 1
            self.verdicts[shape] = verdict
            self.longest[shape] = max(tokens, self.longest.get(shape, 0))

    def is_longer(self, shape: Hashable, tokens: int) -> bool:
        """Return True if an answer of so many tokens is more than twice as long as any that was
        right: a model may compute otherwise further on."""
        return tokens > 2 * self.longest.get(shape, 0)

    def fail(self, shape: Hashable, why: str, verdict: str = OWN) -> bool:
        """Note that an answer was not the model's own; return whether nobody was told yet."""
        with self._lock:
            self.read += 1
            self.failed += 1
            self.verdicts[shape] = verdict
            told = bool(self.why)
            self.why += [] if why in self.why else [why]
            return not told

    def following(self) -> Readings:
        """Return those of the model once it has changed, which count on."""
        return Readings(read=self.read, failed=self.failed, why=self.why)
