"""What is promised of one answer: decided once, and said alike wherever the answer is shown.

The page, the command line, the server and Python print a verdict's sentence, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from offramp.promises.likeness import Likeness, is_unlike

if TYPE_CHECKING:
    from offramp.promises.guarantee import Promise  # which loads PyTorch

EXACT = "The full model's own answer."
NONE = "Nothing is promised of it."
UNCALIBRATED = "these exits are not calibrated"
BROKEN = "the watch found the promise broken"


class Status(Protocol):
    """A guarantee's status under the conditions of an answer, as of
    `offramp.promises.guarantee.GuaranteeStatus`."""

    @property
    def promise(self) -> Any: ...
    @property
    def why(self) -> str: ...


@dataclass(frozen=True)
class Verdict:
    """The verdict on an answer.

    promise: for the answer's kind of prompt; None: nothing is promised. why: the reason in words:
    objections, or the promise. exact: the full model wrote or checked the answer. p_value: of
    "asked as the calibrated ones were"; None: not tested. untested: parts not tested, in words.
    """

    promise: Promise | None = None
    why: str = ""
    exact: bool = False
    p_value: float | None = None
    untested: str = ""

    @property
    def says(self) -> str:
        """Return the verdict in about five words."""
        if self.exact:
            return EXACT
        return NONE if self.promise is None else f"Promised: at most {self.promise.amount}."

    @property
    def reason(self) -> str:
        """Return the reason of the verdict, with the parts that were not tested."""
        return "; ".join(filter(None, (self.why, self.untested)))

    @property
    def sentence(self) -> str:
        """Return the verdict and its reason."""
        return f"{self.says} ({self.reason})" if self.reason else self.says

    @property
    def brief(self) -> str:
        """Return the verdict in at most fifteen words: a promise without what it is about, else its
        reason."""
        if self.promise is None:
            return self.sentence
        return f"{self.says[:-1]}, with {self.promise.confidence:.0%} confidence."

    @property
    def unlike(self) -> bool:
        """Return True if the request is called unlike the calibrated ones."""
        return is_unlike(self.p_value)

    @property
    def rank(self) -> int:
        """Return how much is promised, as a number; of several answers the lowest rank counts."""
        return 2 if self.exact else int(self.promise is not None)

    def to_json(self) -> dict[str, Any]:
        return {
            "says": self.says,
            "why": self.reason,
            "promised": self.promise is not None,
            "exact": self.exact,
            "p_value": self.p_value,
        }


def decide(
    status: Status,
    *,
    exact: bool = False,
    broken: bool = False,
    kind: str = "",
    likeness: Likeness | None = None,
    scores: Sequence[float] = (),
    look: Any = None,
) -> Verdict:
    """Return the verdict on an answer.

    status: under the answer's conditions. exact: the full model wrote it, or checked each token.
    broken: the watch called the promise broken. kind: of its prompt. likeness: of the calibrated
    answers. scores: of the answer's tokens. look: of its image, by `look_of`.
    """
    if exact:
        return Verdict(exact=True, why=BROKEN if broken else "")
    if status.promise is None:
        return Verdict(why=status.why or UNCALIBRATED)
    promise = status.promise.of_kind(kind)
    tested = (likeness or Likeness({})).test(kind, scores, look)
    against = BROKEN if broken else promise.empty
    if not against and tested.p_value is not None and is_unlike(tested.p_value):
        against = f"image or prompt is unlike those calibrated (p = {tested.p_value:.2g})"
    if against:
        return Verdict(why=against, p_value=tested.p_value)
    why = f"with {promise.confidence:.0%} confidence {promise.claim}"
    return Verdict(promise, why, p_value=tested.p_value, untested=tested.untested)
