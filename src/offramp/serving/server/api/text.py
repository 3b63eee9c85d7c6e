"""Answers as text while they are written: nothing is given out that a later token could change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_HALF = "\ufffd"
"""What a letter decodes to of which not all bytes are there yet."""
_WINDOW = 16
"""Tokens that are decoded together, at most but for those of a letter."""


class TextStream:
    """One answer's text, token by token. The pieces form the decoded answer, without special
    tokens, outer spaces, and the text from the first of the strings `stops` on. exact: without the
    tokenizer's clean-up, which moves spaces before punctuation."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), *, exact: bool = False) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._more = {"clean_up_tokenization_spaces": False} if exact else {}
        self._ids: list[int] = []
        # Where the tokens begin that the next one is decoded with, which of these are decoded for
        # good, and their text.
        self._from = self._until = 0
        self._before = ""
        self._text = ""
        self._sent = 0
        self.stopped: bool = False

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, **self._more))

    def put(self, token: int) -> str:
        """Take a token, and return the text that is certain now; often empty."""
        self._ids.append(token)
        # Decoded with some tokens before it, as spaces depend on the neighbour.
        both = self._decode(self._ids[self._from :])
        if not both.endswith(_HALF) and len(both) > len(self._before):
            self._text += both[len(self._before) :]
            self._before = both
            last, self._until = self._until, len(self._ids)
            if self._until - self._from > _WINDOW:
                self._from = last
                self._before = self._decode(self._ids[last:])
        return self._give(self._certain())

    def finish(self) -> str:
        """Return the rest of the text."""
        whole = self._decode(self._ids).strip()
        sent = self._shown()[: self._sent]
        # A tokenizer whose text of a whole is not that of its parts: what was sent stands.
        self._text = whole if whole.startswith(sent) else self._shown()
        return self._give(len(self._cut(self._shown())))

    @property
    def text(self) -> str:
        """Return all text returned so far."""
        return self._shown()[: self._sent]

    def _shown(self) -> str:
        return self._text.lstrip()

    def _cut(self, text: str) -> str:
        """The text before the first stop string."""
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        self.stopped = bool(places)
        return text[: min(places)].rstrip() if places else text.rstrip()

    def _certain(self) -> int:
        """Letters that no later token takes back: no outer spaces, no half of a stop string."""
        text = self._shown()
        certain = len(self._cut(text))
        if self.stopped:
            return certain
        for stop in self._stops:
            for part in range(min(len(stop) - 1, len(text)), 0, -1):
                if text.endswith(stop[:part]):
                    certain = min(certain, len(text[:-part].rstrip()))
                    break
        return certain

    def _give(self, until: int) -> str:
        piece = self._shown()[self._sent : until]
        self._sent = max(self._sent, until)
        return piece


class StopStrings:
    """A search for one of some strings in an answer; as a stopping criterion for Hugging Face's
    `generate`."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._longest = max(map(len, stops))
        self._prompt: int | None = None  # the first call has one token after it

    def found(self, answer: Sequence[int]) -> bool:
        """Return True if the last of these tokens complete one of the strings."""
        # A token has a letter or more, but those of letters with several tokens.
        tail = list(answer[-(4 * self._longest + 8) :])
        text = self._tokenizer.decode(tail, skip_special_tokens=True)
        return any(stop in text for stop in self._stops)

    def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
        if self._prompt is None:
            self._prompt = ids.shape[1] - 1
        answers = ids[:, self._prompt :].tolist()
        return ids.new_tensor([self.found(answer) for answer in answers]).bool()
