"""What a model found when it read answers again, by the shape of what was asked."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass, field

OWN = "own"
"""The verdict on answers that the model's own forward pass writes."""


@dataclass(eq=False)
class Readings:
    """Results of reading one model's answers again; replaced once the model changes.

    verdicts: by shape, the executor with right answers, or `OWN`. longest: by shape, tokens of the
    longest right answer. read, failed: numbers of answers that were read again, and that were
    wrong. why: the reasons of failures, each once. marks: ids of tokens that stand for images and
    the like; None: not yet known. kept: whether the decoder's modules keep what a request set.
    """

    verdicts: dict[Hashable, str] = field(default_factory=dict)
    longest: dict[Hashable, int] = field(default_factory=dict)
    read: int = 0
    failed: int = 0
    why: list[str] = field(default_factory=list)
    marks: frozenset[int] | None = None
    kept: bool = False
    _answers: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def words(self) -> str:
        """Return the results in one line, for people."""
        why = f": {self.why[0]}" if self.why else ""
        return f"{self.read} answers read again by the model, {self.failed} not its own{why}"

    def __reduce__(self) -> tuple[type[Readings], tuple[()]]:
        return Readings, ()  # a model's copy, here or in another process, reads for itself

    def due(self, share: float) -> bool:
        """Return True if the next answer is to be read again: at a share of .01 every hundredth, so
        that every run reads the same answers."""
        with self._lock:
            self._answers += 1
            return int(self._answers * share) > int((self._answers - 1) * share)

    def note(self, shape: Hashable, verdict: str, tokens: int) -> None:
        """Note that an answer of `tokens` tokens was read again and was right."""
        with self._lock:
            self.read += 1
            self.verdicts[shape] = verdict
            self.longest[shape] = max(tokens, self.longest.get(shape, 0))

    def is_longer(self, shape: Hashable, tokens: int) -> bool:
        """Return True if an answer of `tokens` tokens is more than twice as long as any right one:
        models may compute long texts differently."""
        return tokens > 2 * self.longest.get(shape, 0)

    def fail(self, shape: Hashable, why: str, verdict: str = OWN) -> bool:
        """Note that an answer was not the model's own; return True for the first such warning."""
        with self._lock:
            self.read += 1
            self.failed += 1
            self.verdicts[shape] = verdict
            told = bool(self.why)
            self.why += [] if why in self.why else [why]
            return not told

    def following(self) -> Readings:
        """Return empty results for the changed model, with the counts continued."""
        return Readings(read=self.read, failed=self.failed, why=self.why)
