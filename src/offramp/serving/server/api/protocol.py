"""Requests of OpenAI's API, as far as they are supported; every other field is refused.

A field that is null counts as left out. Fields that ask for nothing (a user's name, an empty list
of tools) are taken; what would change an answer is supported or refused, never ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from offramp.core.decoding.policy import Mode


class Strict(BaseModel):
    """The base of request bodies: unknown fields are refused, nothing is converted, null means left
    out."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, frozen=True
    )

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: field for name, field in value.items() if field is not None}
        return value


_DEPTH = re.compile("[1-9][0-9]{0,4}")


def _depths(value: Any) -> Any:
    """Depths from JSON's text keys: numbers, each in one spelling."""
    if isinstance(value, Mapping):
        return {
            int(key) if isinstance(key, str) and _DEPTH.fullmatch(key) else key: field
            for key, field in value.items()
        }
    return value


class OfframpOptions(Strict):
    """Options of how the answer uses the exits. mode: None: the server's. thresholds: by depth,
    instead of the adapter's. trust: instead of the adapter's; above 1 nothing is taken."""

    mode: Mode | None = None
    thresholds: (
        Annotated[
            dict[int, Annotated[float, Field(ge=0, le=1)]],
            BeforeValidator(_depths),
            Field(min_length=1, max_length=64),
        ]
        | None
    ) = None
    trust: Annotated[float, Field(ge=0, le=2)] | None = None


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] = False


# -- messages --------------------------------------------------------------------------------------


class ImageUrl(Strict):
    """An image in a message.

    url: a data URI, or an address on the server's allow-lists. detail: ignored, because images are
    read at the size on which the model and its exits were trained.
    """

    url: str
    detail: Literal["low", "high", "auto"] = "auto"


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Strict):
    """One turn. Only the user's turns hold images."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(min_length=1)]
    name: str | None = None  # of who speaks: no template writes it

    @model_validator(mode="before")
    @classmethod
    def _without_empty_lists(cls, value: Any) -> Any:
        """An answer that a client sends back holds lists of what there was none of."""
        if not isinstance(value, Mapping):
            return value
        return {
            n: v for n, v in value.items() if not (n in ("tool_calls", "annotations") and v == [])
        }

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        if isinstance(self.content, str):
            return [TextPart(type="text", text=self.content)]
        return self.content

    @model_validator(mode="after")
    def _images_are_the_users(self) -> Message:
        if self.role != "user" and any(part.type == "image_url" for part in self.parts):
            raise ValueError("images stand in messages of the role 'user'")
        return self


# -- requests --------------------------------------------------------------------------------------


ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
"""A JSON schema: an object, whatever is in it."""


class AnyText(Strict):
    type: Literal["text"]


class AnyJson(Strict):
    """A JSON object without a schema."""

    type: Literal["json_object"]


class NamedSchema(Strict):
    """A schema for answers.

    schema: JSON Schema, as far as llguidance supports it. strict: ignored, because a schema is
    always obeyed.
    """

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class JsonBySchema(Strict):
    """An answer that a JSON schema allows."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[AnyText | AnyJson | JsonBySchema, Field(discriminator="type")]

_ASKS_FOR_NOTHING: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "length_penalty": (1, 1.0),
    "logit_bias": ({},),
    "min_p": (0, 0.0),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prompt_cache_retention": ("in-memory", "in_memory", "24h"),
    "reasoning_effort": ("none", "minimal", "low", "medium", "high", "xhigh"),
    "service_tier": ("auto", "default", "flex", "priority"),
    "skip_special_tokens": (True,),
    "store": (False, True),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
}
"""Fields that are not supported, and the values with which they ask for nothing: these are taken,
every other value is refused. A model that does not reason does so at any effort, and nothing is
stored."""
_CALLS = {"tool_choice": "tools", "function_call": "functions"}
"""Fields of which "none" says that none of the others is to be called."""

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]


class Sampling(Strict):
    """The fields that both kinds of completion share.

    temperature: None: by the model's own generation configuration. top_k: 0 or -1: off. ignore_eos:
    write on to the longest answer. response_format: an answer that ends by itself parses.
    """

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] = 1.0
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    offramp: OfframpOptions | None = None
    # Names for the caller's own use.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value

        def empty(name: str, field: Any) -> bool:
            nothing = _ASKS_FOR_NOTHING.get(name, ())
            return any(type(field) is type(value) and field == value for value in nothing)

        fields = cls.model_fields
        uncalled = {what for name, what in _CALLS.items() if value.get(name) == "none"}
        return {
            n: field
            for n, field in value.items()
            if n not in uncalled and (n in fields or not empty(n, field))
        }

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for stream=true")
        options = self.offramp
        if options and options.thresholds and options.trust is not None:
            raise ValueError("give offramp.thresholds or offramp.trust")
        named = options and (options.thresholds or options.trust is not None)
        if options and named and options.mode not in (None, "early_exit"):
            raise ValueError("offramp.thresholds and .trust are for offramp.mode 'early_exit'")
        if self.ignore_eos and self.schema_of_answer is not None:
            raise ValueError("ignore_eos writes on after the end of a response_format's JSON")
        return self

    @property
    def schema_of_answer(self) -> Mapping[str, Any] | None:
        """The JSON schema that answers must obey; None: none."""
        match self.response_format:
            case AnyJson():
                return ANY_OBJECT
            case JsonBySchema(json_schema=named):
                return named.schema_
        return None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def longest(self) -> int | None:
        """The requested most tokens of the answer; None: not requested."""
        return self.max_tokens

    @property
    def top_logprobs_wanted(self) -> int | None:
        """Return how many of the likeliest tokens to report at each place; None: no
        probabilities."""
        raise NotImplementedError


class ChatRequest(Sampling):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is for logprobs=true")
        return self

    @property
    def longest(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top_logprobs_wanted(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class CompletionRequest(Sampling):
    """The body of `/v1/completions`. prompt: text or token ids, one or several. images: of every
    prompt, as a chat's `image_url`; an extension."""

    prompt: str | Ids | Annotated[list[str] | list[Ids], Field(min_length=1)]
    images: list[str] = Field(default_factory=list)
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    @property
    def top_logprobs_wanted(self) -> int | None:
        return self.logprobs


def asked_text(request: Sampling) -> str:
    """Return the question of a request with one image: its only prompt, or the texts of its last
    message."""
    if isinstance(request, ChatRequest):
        return "\n".join(p.text for p in request.messages[-1].parts if p.type == "text")
    assert isinstance(request, CompletionRequest)
    return str(request.prompts[0])


class TokenizeRequest(Strict):
    """The body of `/tokenize`: a text, or a conversation as the model would read it, without
    images."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class ResetRequest(Strict):
    """The body of `/v1/watch/reset`."""

    model: str | None = None


class JudgedAnswer(Strict):
    """The body of `/v1/watch/answer`: the id of a reply, and people's right answers."""

    model: str | None = None
    id: Annotated[str, Field(max_length=200)]
    references: Annotated[
        list[Annotated[str, Field(pattern=r"\S", max_length=10_000)]],
        Field(min_length=1, max_length=100),
    ]


class DetokenizeRequest(Strict):
    """The body of `/detokenize`."""

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=100_000)]
