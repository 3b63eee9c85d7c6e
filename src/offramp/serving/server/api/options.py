"""How one answer is generated, as the fields of a request say it, for any engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from offramp.serving.server.api.protocol import Sampling
from offramp.serving.server.errors import ApiError

GREEDY_BELOW = 1e-4
"""Temperatures below are 0: the largest logit would win anyway, or nothing but infinities."""


@dataclass(frozen=True)
class PlaceLogprobs:
    """The log-probabilities at one place of an answer: of the token there, and of the likeliest
    ones, by id, largest first."""

    value: float
    top: dict[int, float]


@dataclass
class NotedLogprobs:
    """The log-probabilities at each place of an answer, as the model gave them: before temperature
    and top-p, after penalties. top: number of the likeliest tokens at each place."""

    top: int
    places: list[PlaceLogprobs] = field(default_factory=list)

    def settle(self, token: int) -> None:
        """Note that the next place finally holds `token`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Generation:
    """Settings by which one answer is generated. logprobs: their store, if wanted. plain: greedy
    and without rules of its own, so that the adapter's guarantee applies."""

    options: Mapping[str, Any]
    seed: int | None
    longest: int
    logprobs: NotedLogprobs | None
    plain: bool


@dataclass(frozen=True)
class Drawn:
    """Settings of sampling; temperature 0: the likeliest token. top_k: number of likeliest tokens
    to sample from; 0: all."""

    temperature: float
    top_p: float
    top_k: int


def sampled_by(request: Sampling) -> Drawn | None:
    """Return a request's settings of sampling; None: the model's own configuration decides."""
    temperature = request.temperature
    if temperature is None and request.top_p is None and request.top_k is None:
        return None
    temperature = 1.0 if temperature is None else temperature
    top_p = 1.0 if request.top_p is None else request.top_p
    if temperature < GREEDY_BELOW:
        temperature = 0.0
    return Drawn(temperature, top_p, max(request.top_k or 0, 0))


def seed_of(request: Sampling, choice: int) -> int | None:
    """Return the seed of answer number `choice`; None: any seed."""
    return None if request.seed is None else (request.seed + choice) % 2**63


def longest_answer(asked: int | None, room: int, prompt: int, usual: int) -> int:
    """Return the most tokens of the answer, where the slot has `room` left after the prompt.

    Raises:
        ApiError: the prompt, or the prompt and the requested length, does not fit.
    """
    if room < 1 or (asked is not None and asked > room):
        wanted = f" and an answer of up to {asked}" if asked is not None else ""
        raise ApiError(
            400,
            f"A prompt of {prompt} tokens{wanted} does not fit into the {prompt + room} tokens of "
            "the context. Shorten the prompt or lower max_completion_tokens.",
            param="messages",
            code="context_length_exceeded",
        )
    return min(usual, room) if asked is None else asked
