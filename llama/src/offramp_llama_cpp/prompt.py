"""A prompt as the decoder gets it: states, their positions, and what else belongs to its rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from offramp.core.errors import InputError
from offramp_llama_cpp.native.tap import States

Positions = npt.NDArray[np.int32]
Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Prompt:
    """Rows that enter a decoder.

    states: [T, D]. positions: [4, T] (time, height, width, and time once more), where the decoder
    has such; None: from 0 on. features: [T, layers, D], what is added to the states after the
    first layers; None: nothing. ahead: spans [start, stop) whose rows see each other, in order;
    all other rows see what stands before them.
    """

    states: States
    positions: Positions | None = None
    features: States | None = None
    ahead: tuple[Span, ...] = ()

    def common(self, other: Prompt) -> int:
        """Return the length of the longest common beginning of two prompts, bit for bit.

        This prompt's last row never counts, since its logits are needed. The beginning does not end
        inside an image whose rows share positions, and is 0 where rows look ahead.
        """
        n = min(len(self.states) - 1, len(other.states))
        same = (self.states[:n] == other.states[:n]).all(1)
        for own, its in zip(self._beside(n), other._beside(n), strict=True):
            if own is None or its is None or own.shape != its.shape:
                same &= own is its
            else:
                same &= (own == its).all(1)
        n = 0 if self.ahead or other.ahead else int(same.cumprod().sum())
        times = None if self.positions is None else self.positions[0]
        while times is not None and n and times[:n].max() >= times[n]:  # within an image
            n -= 1
        return n

    def _beside(self, rows: int) -> tuple[Positions | None, States | None]:
        """Positions and features of the first rows [rows, ...]."""
        positions, features = self.positions, self.features
        return (
            None if positions is None else positions[:, :rows].T,
            None if features is None else features[:rows].reshape(rows, -1),
        )

    def table(self, axes: int, rows: int) -> Positions:
        """Positions [axes, rows] of the prompt and of what follows it.

        After an image text goes on after its largest position.
        """
        table = np.empty((axes, rows), dtype=np.int32)
        length = 0 if self.positions is None else self.positions.shape[1]
        first = 0
        if self.positions is not None and length:
            table[:, :length] = self.positions
            first = int(self.positions.max()) + 1
        table[:, length:] = np.arange(first, first + rows - length, dtype=np.int32)
        return table

    def calls(self, most: int) -> Iterator[tuple[int, int, bool]]:
        """Rows [start, stop) of each call that reads the prompt, and whether they look ahead.

        most: rows in a call. A span that looks ahead is one call, however long.
        """
        at = 0
        for start, stop in (*self.ahead, (len(self.states), len(self.states))):
            yield from ((i, min(i + most, start), False) for i in range(at, start, most))
            if stop > start:
                yield start, stop, True
            at = stop


def check_context(prompt: int, answer: int, context: int, *, unread: int = 1) -> None:
    """Raise `InputError` where a context has too few columns for a prompt and its answer. unread:
    tokens at the answer's end that need no column."""
    if prompt + answer - unread > context:
        raise InputError(
            f"A prompt of {prompt} tokens and an answer of {answer} are longer than the context of "
            f"{context}.",
            "Load the model with a longer one (--context), or lower max_new_tokens.",
        )
