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
    """A row that an executor took over: its handle, the columns of its prompt, and how many of them
    each segment ran."""

    handle: Handle
    columns: int
    ran: Sequence[int]


class Executor(Protocol):
    """Runs segments for sequences, each by a handle of its own.

    depths: of the exits in use, ascending. rows: sequences that one call is over, at most;
    positions: columns of a sequence, at most; None: any number. opens: whether prompts may wait
    that have yet to run, or to be verified with their first drafts. feed_on: as of `FeedOn` in
    `offramp.core.decoding.drafting`; None: it feeds nothing by itself.
    """

    depths: tuple[int, ...]
    rows: int | None
    positions: int | None
    opens: bool

    @property
    def feed_on(self) -> Callable[..., list[tuple[int, Any]]] | None: ...

    def load(self, prompt: Any, row: int) -> LoadedPrompt:
        """Take over a row of a prompt that was read: by a `PromptReader`, or by one of its own."""
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

        needs_exit: False where nobody asks the exit, which then only stores its keys.
        """
        ...

    def run(self, segment: int, spans: Sequence[Span], asked: Sequence[int]) -> Any:
        """Run a segment over columns that are pending before it, all of each sequence: before
        segment 0 those of prompts that only entered.

        asked: which of the spans' columns, counted through, are asked about: outputs are of these.
        Returns what the next exit makes of them, or the full model after the last segment.
        """
        ...

    def full(self, handles: Sequence[Handle], ids: Sequence[int], columns: Sequence[int]) -> Any:
        """Run one token of each sequence through all layers; exits store nothing."""
        ...

    def verify(
        self, handles: Sequence[Handle], ids: Sequence[Sequence[int]], columns: Sequence[int]
    ) -> Any:
        """Run the next tokens of each sequence together, from its column on, through all layers and
        the exit that drafts on, if there is one. Return for all tokens what `full` returns for one.
        """
        ...

    def allow_crops(self, handle: Handle) -> bool:
        """Keep what taking tokens back may need; False where they cannot be taken back."""
        ...

    def crop(self, handle: Handle, column: int) -> None:
        """Forget a sequence's keys and states from `column` on."""
        ...

    def release(self, handle: Handle) -> None:
        """Forget a sequence."""
        ...

    def close(self) -> None:
        """Release all sequences and their memory; the executor is then as it was made."""
        ...


def too_long(positions: int) -> InputError:
    """Return the error for a prompt and answer that need more columns."""
    return InputError(
        f"Prompt and answer are longer than the backbone's {positions} positions.",
        "Shorten the prompt, or lower max_new_tokens.",
    )
