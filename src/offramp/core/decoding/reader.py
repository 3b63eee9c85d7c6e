"""What the decoder asks of those who know arrays: what exits and the full model say next, and what
a row's own rules make of it. Nothing here, nor in the decoder, needs PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from offramp.core.decoding.rule import ExitRule, ExitVerdict

Decide = Callable[[int, Any], bool]
"""Is told the exit's depth and what the exit made of each row's newest token, as the heads take it;
returns True once every row has exited."""


class TokenSampler(Protocol):
    """The rules of one row as the decoder sees them: when its answer ends. What may come next is
    between the sampler and the heads.

    prompt: token ids of the row's prompt. ends: whether a token ends the answer; the same object
    for samplers of the same end tokens. free: whether the next token is always that of the largest
    logit, and only length and end tokens end the answer. foreseen: `free`, and no streamer or
    observer hears a token before the answer is over.
    """

    @property
    def prompt(self) -> Sequence[int]: ...

    @property
    def ends(self) -> Callable[[int], bool]: ...

    @property
    def free(self) -> bool: ...

    @property
    def foreseen(self) -> bool: ...

    def would_end(self, tokens: int, last: int) -> bool:
        """Return True if an answer of `tokens` tokens, with `last` as the last, is over by length
        or by its end token."""
        ...

    def emit(self, ids: Sequence[int], place: int, depth: int, score: float) -> bool:
        """Give out the token at `place` of the answer `ids`; True where the answer is over."""
        ...


class Query(NamedTuple):
    """A sequence's question to an exit or the LM head: the token after the tokens `before` of its
    answer. sampler: a `TokenSampler` of the heads' own kind, one for each sequence."""

    sampler: Any
    rule: ExitRule
    before: Sequence[int]


Word = Callable[[int, Query], int]
"""Returns the token that a query gets out of one of several rows, by its place among them. Raises
what the row's own rules raise."""


class Heads(Protocol):
    """Read the predictions of exits and LM head off an executor's output; nothing else reads it."""

    def computing(self) -> AbstractContextManager[Any]:
        """The context in which the decoder's calls are made."""
        ...

    def verdicts(
        self, depth: int, output: Any, queries: Sequence[Query | None]
    ) -> list[ExitVerdict | Exception | None]:
        """Return the prediction of the exit at `depth` for each query: None where there is no
        query or the exit can say no token that is allowed; an error where the row's own rules
        raised one."""
        ...

    def of_logits(self, logits: Any) -> Word:
        """Return the function that picks tokens from raw logits [n, V]."""
        ...

    def words(self, final: Any) -> Word:
        """Return the function that picks tokens from the full model's output `final`."""
        ...


class PrefillBackend(Protocol):
    """Reads prompts for an executor. The result of `read` has `logits` [B, V] of the first tokens;
    None where every first token exited or the prompt waits for its drafts."""

    def read(
        self,
        prepared: Any,
        *,
        use_exits: bool = True,
        decide: Decide | None = None,
        asks: frozenset[int] = frozenset(),
        keep: int | None = None,
        waits: bool = False,
        enters: bool = False,
    ) -> Any:
        """Run a prompt of one or more rows.

        prepared: the prompt, as this reader takes it. use_exits: whether the exits store their
        keys. decide: is asked about each row's first token at the exits of the depths `asks`; None:
        the prompt runs to full depth. keep: depth of the exit whose state of each row's newest
        token is kept for the drafter. waits: whether the prompt may wait at that exit for its first
        drafts. enters: whether the prompt may wait before the first layer, to run together with
        others.
        """
        ...
