"""Answers and chunks of a stream, as OpenAI's API has them; plain dicts, made per token."""

from __future__ import annotations

import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from offramp.promises.verdict import Verdict
from offramp.serving.server.api.options import NotedLogprobs


@dataclass
class Written:
    """One choice, during and after its generation.

    depths: of its tokens. reason: why it ended; None: unfinished. sent: tokens whose depths and
    log-probabilities were sent. verdict: what is promised of it; None: unfinished. details: of its
    tokens, for requests with options of offramp; None: unfinished, or not asked for.
    """

    index: int
    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    text: str = ""
    reason: str | None = None
    sent: int = 0
    verdict: Verdict | None = None
    details: dict[str, Any] | None = None


@dataclass(frozen=True)
class Reply:
    """The fields that all parts of one reply share.

    mode: how the exits were used. layers: of the full model.
    """

    model: str
    chat: bool
    mode: str
    layers: int
    prompt_tokens: int
    tokenizer: Any
    number: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def id(self) -> str:
        """Return the id of the reply for clients."""
        return f"{'chatcmpl' if self.chat else 'cmpl'}-{self.number}"

    # -- parts -------------------------------------------------------------------------------------

    def usage(self, choices: Sequence[Written]) -> dict[str, Any]:
        """Return the tokens so far, and their depths. accepted_drafts: for lossless answers, tokens
        by an exit that the full model confirmed."""
        depths = [depth for choice in choices for depth in choice.depths]
        written = len(depths)
        early = sum(depth < self.layers for depth in depths)
        offramp: dict[str, Any] = {
            "mode": self.mode,
            "layers": self.layers,
            "mean_depth": sum(depths) / written if written else None,
            "depths": {str(depth): n for depth, n in sorted(Counter(depths).items())},
            "accepted_drafts": early if self.mode == "lossless" else 0,
        }
        verdicts = [choice.verdict for choice in choices if choice.verdict is not None]
        if verdicts:  # of several, the one that least is promised of
            offramp["verdict"] = min(verdicts, key=lambda verdict: verdict.rank).to_json()
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.prompt_tokens + written,
            "offramp": offramp,
        }

    def whole(
        self, choices: Sequence[Written], noted: Sequence[NotedLogprobs | None]
    ) -> dict[str, Any]:
        """Return the reply to a request without a stream."""
        rows = []
        for choice, logprobs in zip(choices, noted, strict=True):
            row: dict[str, Any] = {"index": choice.index, "finish_reason": choice.reason}
            row["logprobs"] = self.logprobs(choice, logprobs, 0, 0)
            if choice.details is not None:
                row["offramp"] = {"depths": choice.depths, **choice.details}
            if self.chat:
                row["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
            else:
                row["text"] = choice.text
            rows.append(row)
        return {**self._frame(""), "choices": rows, "usage": self.usage(choices)}

    def opening(self, index: int) -> dict[str, Any]:
        """Return the chunk that names the speaker, for chats alone."""
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None)

    def piece(
        self, choice: Written, text: str, logprobs: Any, depths: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """Return a chunk of text. depths: of its tokens, if wanted."""
        content: dict[str, Any] = {"delta": {"content": text}} if self.chat else {"text": text}
        if depths is not None:
            content["offramp"] = {"depths": list(depths)}
        return self._chunk(choice.index, content, None, logprobs)

    def ending(self, choice: Written) -> dict[str, Any]:
        """Return the chunk with the reason why a choice ended, and the details of its tokens."""
        content: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        if choice.details is not None:
            # All depths were sent with their texts.
            content["offramp"] = {"depths": [], **choice.details}
        return self._chunk(choice.index, content, choice.reason)

    def counted(self, choices: Sequence[Written]) -> dict[str, Any]:
        """Return the last chunk, with the usage alone."""
        return {**self._frame(".chunk"), "choices": [], "usage": self.usage(choices)}

    def _frame(self, kind: str) -> dict[str, Any]:
        name = f"chat.completion{kind}" if self.chat else "text_completion"
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}

    def _chunk(
        self, index: int, content: dict[str, Any], reason: str | None, logprobs: Any = None
    ) -> dict[str, Any]:
        row = {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}
        return {**self._frame(".chunk"), "choices": [row]}

    # -- log-probabilities -------------------------------------------------------------------------

    def logprobs(
        self, choice: Written, noted: NotedLogprobs | None, begin: int, offset: int
    ) -> dict[str, Any] | None:
        """Return the log-probabilities of a choice's tokens from number `begin` on. offset: place
        of their first character in the text."""
        if noted is None:
            return None
        if self.chat:
            places = range(begin, len(choice.tokens))
            return {"content": [self._place(choice, noted, n) for n in places], "refusal": None}
        rows: dict[str, list[Any]] = {
            name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        for n in range(begin, len(choice.tokens)):
            place, text_of = noted.places[n], self._texts(choice, n)
            text = text_of(choice.tokens[n])
            rows["tokens"].append(text)
            rows["token_logprobs"].append(_finite(place.value))
            rows["top_logprobs"].append({text_of(i): _finite(v) for i, v in place.top.items()})
            rows["text_offset"].append(offset)
            offset += len(text)
        return rows

    def _place(self, choice: Written, noted: NotedLogprobs, n: int) -> dict[str, Any]:
        place, text_of = noted.places[n], self._texts(choice, n)

        def entry(token: int, value: float) -> dict[str, Any]:
            text = text_of(token)
            return {"token": text, "logprob": _finite(value), "bytes": list(text.encode())}

        top = [entry(token, value) for token, value in place.top.items()]
        return {**entry(choice.tokens[n], place.value), "top_logprobs": top}

    def _texts(self, choice: Written, n: int) -> Callable[[int], str]:
        """What tokens add to the answer at place `n`; a space before a word shows only there."""
        before = choice.tokens[n - 1 : n] if n else []
        known = str(self.tokenizer.decode(before))

        def text_of(token: int) -> str:
            both = str(self.tokenizer.decode([*before, token]))
            return both[len(known) :] if both.startswith(known) else self.tokenizer.decode([token])

        return text_of


def _finite(value: float) -> float:
    """A log-probability for JSON, which has no infinity: OpenAI's least is -9999."""
    return max(value, -9999.0)


def event(value: dict[str, Any]) -> bytes:
    """Return a value as a server-sent event."""
    return b"data: " + _JSON.encode(value).encode() + b"\n\n"


_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # `dumps` makes one a call


DONE = b"data: [DONE]\n\n"
