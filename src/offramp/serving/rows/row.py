"""The tokens of one request in a slot: which are fed, which are settled, which are guesses.

A token is *fed* to the shallow layers at a column of its own, and the exit there says the next one.
Where the exit is confident that token stands. Where it is not, the row *parks* until the deep
layers have spoken, or goes on from the exit's token as a *guess*; what follows a guess falls with
it. Fed tokens that the deep layers have not run yet are *pending*. All of it is counted in tokens
of the answer, so going back is setting integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """A token, the depth it is counted at, and the score of the last exit that looked at it."""

    token: int
    depth: int
    score: float = float("nan")


class Row:
    """One answer. start: columns of its prompt, which its first token comes behind.

    choices: the answer so far, provisional ones too. fed, deep: how many of its tokens ran through
    the shallow layers, and how many of these through the deep ones. settled: how many can no longer
    change. guesses: places in the answer of those that wait for the deep layers' word. waited:
    shallow calls since the oldest of these questions was asked, or without this row.
    """

    def __init__(self, start: int, first: Choice) -> None:
        self.start = start
        self.choices: list[Choice] = [first]
        self.fed = self.deep = self.settled = self.waited = 0
        self.guesses: list[int] = []
        self.held = False
        self._parked = Choice(-1, -1)

    @property
    def tokens(self) -> list[int]:
        return [choice.token for choice in self.choices]

    @property
    def parked(self) -> bool:
        """Whether nothing was said yet behind the last token that was fed."""
        return self.fed == len(self.choices)

    @property
    def pending(self) -> int:
        """Tokens whose states wait before the deep layers."""
        return self.fed - self.deep

    @property
    def asks(self) -> bool:
        """Whether the deep layers must speak before this row's next token can be settled."""
        return bool(self.guesses) or self.parked

    def idle(self, longest: int) -> bool:
        """Whether only a deep call gets it on: it parked, or has `longest` tokens pending."""
        return self.parked or self.pending >= longest

    def ready(self, longest: int) -> bool:
        """Whether its next token can be fed, no more than `longest` being pending."""
        return not self.idle(longest) and not self.held

    @property
    def column(self) -> int:
        """Where the next token is written. In a row that is not ready nothing of worth is there."""
        return self.start + self.fed

    @property
    def feed(self) -> int:
        """The next token to feed; some token, where the row is parked."""
        return self.choices[min(self.fed, len(self.choices) - 1)].token

    @property
    def columns(self) -> range:
        """Columns of the pending tokens."""
        return range(self.start + self.deep, self.start + self.fed)

    @property
    def questions(self) -> list[int]:
        """Places in the answer that the deep layers are to fill, ascending."""
        return [*self.guesses, *([self.fed] if self.parked else [])]

    # -- what the calls bring ------------------------------------------------------------------

    def say(self, choice: Choice) -> None:
        """The fed token is followed by `choice`, whatever deeper layers may think."""
        self.fed += 1
        self.choices.append(choice)
        self.waited += bool(self.guesses)

    def guess(self, choice: Choice) -> None:
        """The fed token is provisionally followed by `choice`."""
        self.say(choice)
        self.guesses.append(len(self.choices) - 1)

    def park(self, score: float) -> None:
        """The fed token is followed by nothing yet; the exit gave it `score`."""
        self.fed += 1
        self.waited += bool(self.guesses)
        self._parked = Choice(-1, -1, score)

    def asked(self, place: int) -> Choice:
        """What the exit said at a place that is in question: of no token where it parked."""
        return self._parked if place == len(self.choices) else self.choices[place]

    def wait(self) -> None:
        """A shallow call went by without this row."""
        self.waited += 1

    def passed(self, choice: Choice) -> None:
        """The fed token ran through all layers at once, and `choice` came out."""
        self.say(choice)
        self.deep = self.fed

    def answer(self, place: int, choice: Choice) -> bool:
        """The deep layers' word on `place`: the oldest question. False where it was another one.

        A wrong guess takes all that was built on it along; the remaining questions are void then.
        """
        if place == len(self.choices):
            self.choices.append(choice)
            return True
        self.guesses.remove(place)
        right = self.choices[place].token == choice.token
        self.choices[place] = choice
        if not right:
            del self.choices[place + 1 :]
            self.fed, self.guesses = place, []
        return right

    def caught_up(self) -> None:
        """All that was pending ran through the deep layers, and all questions are answered."""
        self.deep, self.waited, self.held = self.fed, 0, False

    def settle(self) -> Sequence[Choice]:
        """Those that can no longer change and were not given out yet."""
        until = self.guesses[0] if self.guesses else len(self.choices)
        fresh = self.choices[self.settled : until]
        self.settled = until
        return fresh

    def end(self, tokens: int) -> None:
        """The answer ends with its first `tokens` tokens."""
        del self.choices[tokens:]
        self.settled, self.guesses = tokens, []
