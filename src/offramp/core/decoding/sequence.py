"""The state of one answer: its tokens, and how many columns each segment of the layers has run.

A token is *fed* to the layers below the first exit at a column of its own; the exit there says the
next token, or the sequence *waits* until deeper layers do. A token, once written, is final. The
exits part the layers into segments: segment 0 is below the first exit, the last one ends at full
depth. Columns that deeper segments have yet to run are *pending*.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from offramp.core.decoding.executor import LoadedPrompt
from offramp.core.decoding.reader import Query, TokenSampler
from offramp.core.decoding.rule import ExitRule

NAN = float("nan")


class Token(NamedTuple):
    """A token of an answer.

    token: its id. depth: decoder layers of the exit that said the token; in lossless mode only
    where the full model says the same, else L; of drafts by trust only where they were taken.
    score: of the last exit that looked, NaN where none did; of drafts that were taken the product
    of their probabilities.
    """

    token: int
    depth: int
    score: float = NAN


@dataclass(eq=False)
class Sequence:
    """One answer that is being written.

    sampler, rule: of its request. handle: the executor's name of the sequence. owner: an object
    that the caller wants to find again. start: columns of the prompt. ran: columns that each
    segment ran, the prompt's included. ids, tokens: the answer so far. score: of the next token, by
    the last exit that checked it. waited: calls of the first segment since the sequence began to
    wait. opened: drafts of an exit after a prompt that waits. rounds: (drafted, accepted) of
    verified drafts. offers: by trust, the product and the resulting answer of each draft that ended
    the answer. over, error: whether the answer has ended, and why it failed.
    """

    sampler: TokenSampler
    rule: ExitRule
    handle: Any
    start: int
    ran: list[int]
    owner: Any = None
    ids: list[int] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    score: float = NAN
    waited: int = 0
    opened: Token | None = None
    rounds: list[tuple[int, int]] = field(default_factory=list)
    offers: list[tuple[float, tuple[int, ...]]] = field(default_factory=list)
    over: bool = False
    error: Exception | None = None

    @classmethod
    def of(
        cls, sampler: TokenSampler, rule: ExitRule, loaded: LoadedPrompt, owner: Any = None
    ) -> Sequence:
        """Return the answer that begins after a prompt that the executor has loaded."""
        return cls(sampler, rule, loaded.handle, loaded.columns, [*loaded.ran], owner)

    @property
    def active(self) -> bool:
        """Return True if the answer goes on."""
        return not self.over and self.error is None

    @property
    def waits(self) -> bool:
        """Return True if the next token needs deeper layers, because the whole answer was fed."""
        return self.ran[0] - self.start == len(self.ids)

    @property
    def query(self) -> Query:
        """Return the question that is put to exits and LM head: the next token of this answer."""
        return Query(self.sampler, self.now, self.ids)

    @property
    def now(self) -> ExitRule:
        """Return the rule of the next token."""
        return self.rule if self.ids else self.rule.opening

    @property
    def next_id(self) -> int:
        """The id of the token to feed; any id where the sequence waits."""
        return self.ids[-1] if self.ids else 0

    def pending(self, segment: int) -> int:
        """Columns that a segment has yet to run."""
        return self.ran[segment - 1] - self.ran[segment]

    def ready(self, longest: int | None) -> bool:
        """Return True if the next token can be fed: the sequence does not wait, and fewer than
        `longest` columns are pending."""
        ran = self.ran
        if ran[0] - self.start == len(self.ids):
            return False
        return longest is None or len(ran) == 1 or ran[0] - ran[1] < longest

    def write(self, token: Token) -> None:
        """Append the next token."""
        self.ids.append(token.token)
        self.tokens.append(token)
        self.score, self.waited = NAN, 0
