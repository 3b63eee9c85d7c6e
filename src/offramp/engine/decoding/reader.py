"""What the decoder asks of those who know arrays: what exits and the full model say next, and what
a row's own rules make of it. Nothing here, nor in the decoder, needs PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from offramp.engine.decoding.rule import ExitRule, Verdict

Looks = Callable[[int, Any], bool]
"""Whether anyone looks at the exit at a depth, which states [n, D] are to enter."""


def anyone(depth: int, entry: Any) -> bool:
    """Looks at every exit."""
    return True


def no_one(depth: int, entry: Any) -> bool:
    """Looks at none."""
    return False


Decide = Callable[[int, Any], bool]
"""Is told what the exit at a depth makes of each row's newest token, as the executor's reader takes
it; True once every row has exited."""


class TokenSampler(Protocol):
    """What may come next in one row is between it and the reader; the decoder asks when it ends."""

    def would_end(self, tokens: int, last: int) -> bool:
        """Whether an answer of so many tokens, the last of them `last`, is over by length or by
        its end token."""
        ...

    def emit(self, ids: Sequence[int], place: int, depth: int, score: float) -> bool:
        """Give out the token at `place` of the answer `ids`; True where the answer is over."""
        ...


class Question(NamedTuple):
    """Who asks what comes behind the tokens `before` of an answer. sampler: a `TokenSampler` of the
    reader's own kind, one for each sequence."""

    sampler: Any
    rule: ExitRule
    before: Sequence[int]


Word = Callable[[int, Question], int]
"""The token that a question gets out of one of several rows, by its place among them: one at a
time, for what follows a wrong token is not asked for. Raises what the row's own rules raise."""


class Reader(Protocol):
    """Asks exits and the LM head, in the arrays of its executor.

    follows: whether a score follows a token from exit to exit, so that none may be ahead of it.
    """

    follows: bool

    def computing(self) -> AbstractContextManager[Any]:
        """Inside of what the decoder's calls are made."""
        ...

    def looks(self, asked: Sequence[Question | None]) -> Looks:
        """Whether any of the questions is put to the exit at a depth, past its gate."""
        ...

    def verdicts(
        self, depth: int, output: Any, asked: Sequence[Question | None]
    ) -> list[Verdict | Exception | None]:
        """Of the exit at `depth` on each token; None where nothing is asked, an error where the
        row's own rules raised one."""
        ...

    def of_logits(self, logits: Any) -> Word:
        """What raw logits [n, V] say."""
        ...

    def words(self, final: Any) -> Word:
        """What the full model says behind each of what its executor ended with."""
        ...


class ReadsPrompts(Protocol):
    """Reads prompts for an executor. What it returns has `logits` [B, V] of the first token, where
    not every row's first token exited, or None, where the prompt waits at an exit all the same and
    layers above are to say it; the rest of it is the executor's affair. Where visual tokens are to
    stay behind, `read` is given `pruning` too, of `offramp.engine.policy.Pruning`."""

    def read(
        self,
        prepared: Any,
        *,
        use_exits: bool = True,
        decide: Decide | None = None,
        looks: Looks = anyone,
        keep: int | None = None,
    ) -> Any:
        """Run a prompt of one or more rows.

        prepared: as this reader takes it. use_exits: whether the exits store their keys. decide:
        asked about each row's first token at every exit; None: it runs to full depth. looks:
        whether anyone looks at an exit. keep: depth of the exit that will draft on from each
        row's newest token.
        """
        ...
