"""The tokens of one answer: which are fed, which are settled, and which are in question.

A token is *fed* to the layers below the first exit at a column of its own, and the exit there says
the next one. Where the exit is confident that token stands. Where it is not, the sequence *parks*
until deeper layers have spoken, or goes on from the exit's token as a *guess*; lossless, all that
exits say are *drafts*, which the full model confirms or replaces. What follows a wrong token falls
with it. The exits part the layers into segments: segment 0 is below the first exit, the last one
ends at full depth. Each has run a number of columns, the prompt's included, so going back is
setting integers.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Any, NamedTuple

from offramp.engine.decoding.executor import Handle
from offramp.engine.decoding.reader import TokenSampler
from offramp.engine.decoding.rule import ExitRule

NAN = float("nan")


class Token(NamedTuple):
    """A token of an answer: its id, the depth that it is counted at (that of the exit which said
    it, in lossless mode only if the full model says the same; else L), and the score of the last
    exit that looked at it, NaN where none did."""

    token: int
    depth: int
    score: float = NAN


class Asked(NamedTuple):
    """A place in the answer that deeper layers are to fill.

    said: what stands there until then; None where the sequence parked. drafted: whether exits have
    done with it, so that the full model alone is asked. score: of the last exit that looked.
    """

    said: Token | None
    drafted: bool = False
    score: float = NAN


class Sequence:
    """One answer, from behind its first token on, or from the prompt where that is yet unsaid.

    sampler, rule: of its request. handle: the executor's name of it. owner: its caller's.
    start: columns of its prompt. ran: columns that each segment ran. tokens: the answer so far,
    with what is in question. asked: by place, what deeper layers are to fill, ascending.
    settled: how many tokens can no longer change. waited: calls of the first segment since the
    oldest question. rounds: lossless, (drafted, accepted) of each time the full model was asked.
    drafts: whether exits draft now, where it is lossless; undrafted: tokens for which they did not,
    as full depth is faster.
    over, error: whether the answer has ended, and why it failed.
    """

    def __init__(
        self,
        sampler: TokenSampler,
        rule: ExitRule,
        handle: Handle,
        start: int,
        ran: Many[int],
        first: Token | Asked,
        layers: int,
        owner: Any = None,
    ) -> None:
        """layers: depth L of the full model. first: the token that the prompt was followed by,
        or, where no exit said it, what layers above which the prompt waits are to fill."""
        self.sampler, self.rule, self.handle, self.owner = sampler, rule, handle, owner
        self.start, self.ran, self.layers = start, list(ran), layers
        self.tokens: list[Token] = []
        self.ids: list[int] = []
        self.asked: dict[int, Asked] = {}
        if isinstance(first, Token):
            self.tokens, self.ids = [first], [first.token]
        else:
            self.asked[0] = first
        self.settled = self.waited = 0
        self.held = self.over = False
        self.error: Exception | None = None
        self.rounds: list[tuple[int, int]] = []
        self.drafts, self.undrafted = True, 0
        self.alone: Any = None  # the question put to the first exit, kept where it is the only one

    @property
    def fed(self) -> int:
        """Tokens of the answer that ran through the first segment."""
        return self.ran[0] - self.start

    def pending(self, segment: int) -> int:
        """Columns that wait before a segment."""
        return self.ran[segment - 1] - self.ran[segment]

    def idle(self, longest: int | None) -> bool:
        """Whether only deeper layers get it on: it parked, nothing being said behind the last token
        that was fed, or as many columns wait as may."""
        ran = self.ran
        if ran[0] - self.start == len(self.tokens):
            return True
        return longest is not None and len(ran) > 1 and ran[0] - ran[1] >= longest

    def ready(self, longest: int | None) -> bool:
        """Whether its next token can be fed, no more than `longest` waiting."""
        return not self.held and not self.idle(longest)

    @property
    def feed(self) -> int:
        """The next token to feed; some token, where it is not ready."""
        return self.ids[min(self.fed, len(self.ids) - 1)] if self.ids else 0

    # -- what the calls bring ------------------------------------------------------------------

    def say(self, token: Token) -> None:
        """The token behind those that were fed stands, whatever deeper layers may think."""
        self._feed()
        self.tokens.append(token)
        self.ids.append(token.token)

    def question(self, said: Token | None, *, drafted: bool = False, score: float = NAN) -> None:
        """The fed token is followed by what deeper layers say; until then by `said`, or nothing."""
        self._feed()
        self.asked[self.fed] = Asked(said, drafted, score)
        if said is not None:
            self.tokens.append(said)
            self.ids.append(said.token)

    def _feed(self) -> None:
        self.ran[0] += 1
        self.waited += bool(self.asked)

    def passed(self, token: Token) -> None:
        """The fed token ran through all layers at once, and `token` came out."""
        self.ran = [column + 1 for column in self.ran]
        self.tokens.append(token)
        self.ids.append(token.token)

    def ends_with(self, token: int) -> bool:
        """Whether the answer is over with a token, as its end token."""
        return self.sampler.would_end(0, token)

    def rule_at(self, place: int) -> ExitRule:
        """How the exits are used for the token at a place."""
        return self.rule if place else self.rule.opening

    def places(self, first: int, end: int) -> list[int]:
        """Places in question behind the columns from `first` up to, and without, `end`."""
        return [place for place in self.asked if first < self.start + place <= end]

    def looked(self, place: int, score: float) -> None:
        """An exit looked at a place and left it to deeper layers."""
        self.asked[place] = self.asked[place]._replace(score=score)

    def draft(self, place: int, said: Token) -> bool:
        """A deeper exit drafts what the full model is to confirm; False where another token stood
        there, which falls with all that was built on it."""
        before = self.asked[place].said
        self.asked[place] = Asked(said, True, said.score)
        return self._put(place, said, before)

    def answer(self, place: int, token: Token) -> bool:
        """The last word on the oldest place in question; False where another token stood there."""
        return self._put(place, token, self.asked.pop(place).said)

    def _put(self, place: int, token: Token, before: Token | None) -> bool:
        if before is None:
            self.tokens.append(token)
            self.ids.append(token.token)
            return True
        self.tokens[place] = token
        if before.token == token.token:
            return True
        del self.tokens[place + 1 :], self.ids[place:]
        self.ids.append(token.token)
        self.held = False
        end = self.start + place
        self.ran = [min(column, end) for column in self.ran]
        self.asked = {at: asked for at, asked in self.asked.items() if at <= place}
        return False

    def caught_up(self) -> None:
        """All questions were answered."""
        self.waited, self.held = 0, False

    def settle(self) -> range:
        """Places of the tokens that can no longer change and were not given out yet."""
        until = len(self.tokens)
        if self.asked:
            until = min(until, next(iter(self.asked)))
        fresh = range(self.settled, until)
        self.settled = until
        return fresh

    def end(self, tokens: int) -> None:
        """The answer ends with its first `tokens` tokens."""
        del self.tokens[tokens:], self.ids[tokens:]
        self.settled, self.asked, self.over = tokens, {}, True
