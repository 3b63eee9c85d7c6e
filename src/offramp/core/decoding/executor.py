"""What runs the layers for the decoder. Exits part them into segments: segment 0 is below the first
exit in use, segment k between exits k and k + 1, the last one ends at full depth.

What a call returns goes on to the executor's own heads, and the decoder does not look into it: of
an exit an `ExitOutput`, of the full model final-normed states [n, D], where the heads are
`ExitHeads`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from offramp.core.errors import InputError

Handle = Any
"""What an executor knows a sequence by: its own affair."""


class Span(NamedTuple):
    """Columns of one sequence from `first` up to, and without, `end`."""

    handle: Handle
    first: int
    end: int


class LoadedPrompt(NamedTuple):
    """A row that an executor took over: its handle, the number of its prompt's columns, and the
    number of columns that each segment ran."""

    handle: Handle
    columns: int
    ran: Sequence[int]


class Executor(Protocol):
    """Runs segments for sequences, each sequence under a handle.

    depths: of the exits in use, ascending. rows: sequences in one call, at most; positions: columns
    of a sequence, at most; None: any number. free_rows: rows of a deep call that take about as long
    as one, since the weights are read once for all of them; None: not known. opens: whether a
    prompt may wait before the first layer, or for its first drafts. feed_on: as of `FeedOn` in
    `offramp.core.decoding.drafting`; None: exits do not draft on.
    """

    depths: tuple[int, ...]
    rows: int | None
    positions: int | None
    free_rows: int | None
    opens: bool

    @property
    def feed_on(self) -> Callable[..., list[tuple[int, Any]]] | None: ...

    def load(self, prompt: Any, row: int) -> LoadedPrompt:
        """Take over a row of a prompt that a `PromptReader`, or the executor's own, has read."""
        ...

    def feed(
        self,
        handles: Sequence[Handle],
        ids: Sequence[int],
        columns: Sequence[int],
        *,
        needs_exit: bool,
    ) -> Any:
        """Run segment 0 and the first exit over one token of each sequence; outputs in that order.

        needs_exit: False: the exit only stores its keys, and its output is not read.
        """
        ...

    def run(self, segment: int, spans: Sequence[Span], asked: Sequence[int]) -> Any:
        """Run a segment over all columns that are pending before it, for each sequence; for segment
        0, over prompts that wait before the first layer.

        asked: positions, counted over all spans, whose outputs are wanted. Returns the outputs of
        the next exit or, after the last segment, of the full model.
        """
        ...

    def full(self, handles: Sequence[Handle], ids: Sequence[int], columns: Sequence[int]) -> Any:
        """Run one token of each sequence through all layers, without the exits' keys."""
        ...

    def verify(
        self, handles: Sequence[Handle], ids: Sequence[Sequence[int]], columns: Sequence[int]
    ) -> Any:
        """Run the next tokens of each sequence, from its column on, through all layers and the exit
        that drafts on (if any). Return for every token what `full` returns for one."""
        ...

    def allow_crops(self, handle: Handle) -> bool:
        """Keep what `crop` may need; return False where tokens cannot be taken back."""
        ...

    def crop(self, handle: Handle, column: int) -> None:
        """Forget a sequence's keys and states from `column` on."""
        ...

    def release(self, handle: Handle) -> None:
        """Forget a sequence."""
        ...

    def close(self) -> None:
        """Release all sequences and their memory; the executor is then as new."""
        ...


def too_long(positions: int) -> InputError:
    """Return the error for a prompt and answer that need more columns than the executor has."""
    return InputError(
        f"Prompt and answer are longer than the backbone's {positions} positions.",
        "Shorten the prompt, or lower max_new_tokens.",
    )
