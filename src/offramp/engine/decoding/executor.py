"""What runs the layers for the decoder. Exits part them into segments: segment 0 is below the first
exit in use, segment k between exits k and k + 1, the last one ends at full depth.

What a call returns goes on to the executor's own reader, and the decoder does not look into it: of
an exit an `ExitOutput`, of the full model final-normed states [n, D], where that is `ExitReader`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from offramp.engine.decoding.reader import Looks
from offramp.errors import InputError

Ends = Callable[[int], bool]
"""Whether an answer is over with a token."""

Handle = Any
"""What an executor knows a sequence by: its own affair."""


class DraftRoom(NamedTuple):
    """How far drafts behind a token go on. most: ids. sure: product of what the exit holds of them,
    each in [0, 1], below which they are worth no row of the verifying call. ends: what stands
    behind an end token is never asked."""

    most: int
    sure: float
    ends: Ends


class Drafts:
    """What was drafted behind a token; none is added where there is no room."""

    def __init__(self, room: DraftRoom) -> None:
        self.ids: list[int] = []
        self._room, self._product = room, 1.0

    def add(self, token: int, share: float) -> bool:
        """Keep the next draft, if it is likely enough to be right; whether another may follow.

        share: its probability.
        """
        room = self._room
        self._product *= share
        if self._product < room.sure:
            return False
        self.ids.append(token)
        return len(self.ids) < room.most and not room.ends(token)


class Span(NamedTuple):
    """Columns of one sequence from `first` up to, and without, `end`."""

    handle: Handle
    first: int
    end: int


class Loaded(NamedTuple):
    """A row that an executor took over: its handle, the columns of its prompt, and how many of them
    each segment ran."""

    handle: Handle
    columns: int
    ran: Sequence[int]


class Executor(Protocol):
    """Runs segments for sequences, each by a handle of its own.

    depths: of the exits in use, ascending. rows: sequences that one call is over, at most;
    positions: columns of a sequence, at most; None: any number.
    """

    depths: tuple[int, ...]
    rows: int | None
    positions: int | None

    def load(self, prompt: Any, row: int) -> Loaded:
        """Take over a row of a prompt that was read: by a `PromptReader`, or by one of its own."""
        ...

    def feed(
        self, handles: Sequence[Handle], ids: Sequence[int], columns: Sequence[int], looks: Looks
    ) -> Any:
        """Segment 0 and the first exit, one token of each sequence; outputs in that order."""
        ...

    def run(self, segment: int, spans: Sequence[Span], asked: Sequence[int], looks: Looks) -> Any:
        """A segment over columns that wait before it, all that do of each sequence.

        asked: which of the spans' columns, counted through, are asked about: outputs are of these.
        Returns what the next exit makes of them, or the full model behind the last segment.
        """
        ...

    def full(
        self,
        handles: Sequence[Handle],
        ids: Sequence[int],
        columns: Sequence[int],
        *,
        exits: bool,
    ) -> Any:
        """One token of each sequence through all layers.

        exits: whether these get their keys, which a sequence needs that will come to them again.
        """
        ...

    def allow_crops(self, handle: Handle) -> bool:
        """Keep what taking tokens back may need; False where they cannot be taken back."""
        ...

    def crop(self, handle: Handle, column: int) -> None:
        """Forget what a sequence has from `column` on."""
        ...

    def release(self, handle: Handle) -> None:
        """Forget a sequence."""
        ...

    def close(self) -> None:
        """Release all that it holds."""
        ...


def too_long(positions: int) -> InputError:
    """Of a prompt and its answer that want more columns."""
    return InputError(
        f"Prompt and answer are longer than the backbone's {positions} positions.",
        "Shorten the prompt, or lower max_new_tokens.",
    )


def check_context(prompt: int, answer: int, context: int, *, unread: int = 1) -> None:
    """Raise `InputError` where a context has too few columns for a prompt and its answer, the last
    `unread` tokens of which get none."""
    if prompt + answer - unread > context:
        raise InputError(
            f"A prompt of {prompt} tokens and an answer of {answer} are longer than the context of "
            f"{context}.",
            "Load the model with a longer one (--context), or lower max_new_tokens.",
        )


class TriedExecutor(Executor, Protocol):
    """One by which full depth can be tried beside the exits, to find out whether these pay."""

    def trial(self, handles: Sequence[Handle], ids: Sequence[int], columns: Sequence[int]) -> Any:
        """A `full` call to be timed, after which nothing has changed. What it reads where columns
        wait above means nothing."""
        ...


class DraftingExecutor(Executor, Protocol):
    """One that was given a `Drafter`: an exit of its own that drafts on."""

    def draft(
        self,
        handles: Sequence[Handle],
        ids: Sequence[int],
        columns: Sequence[int],
        rooms: Sequence[DraftRoom],
    ) -> list[list[int]]:
        """What the drafting exit writes behind the next token of each sequence, from the state that
        it made of the column before: as far as there is room; none where that state is not known.

        Nothing that was verified changes.
        """
        ...

    def verify(
        self, handles: Sequence[Handle], ids: Sequence[Sequence[int]], columns: Sequence[int]
    ) -> Any:
        """Tokens side by side of each sequence, from its column on, through all layers and the
        drafting exit; of all tokens what `full` returns of one, a sequence's behind the other's."""
        ...
