"""A request's fields as Hugging Face's generation options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from offramp.engine.constraint import Constraint
from offramp.serving.server.api.protocol import Sampling
from offramp.serving.server.api.text import StopStrings
from offramp.serving.server.config import ServerConfig
from offramp.serving.server.errors import ApiError

GREEDY_BELOW = 1e-4
"""Temperatures below are 0: the largest logit would win anyway, or nothing but infinities."""


class CountPenalties:
    """OpenAI's penalties: tokens of the answer lose `presence` once and `frequency` each time."""

    def __init__(self, presence: float, frequency: float) -> None:
        self._presence, self._frequency = presence, frequency
        self._prompt: int | None = None  # the first call has nothing behind it

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if self._prompt is None:
            self._prompt = ids.shape[1]
        written = ids[:, self._prompt :]
        ones = torch.ones_like(written, dtype=scores.dtype)
        counts = torch.zeros_like(scores).scatter_add_(1, written, ones)
        return scores - self._frequency * counts - self._presence * (counts > 0)


@dataclass(frozen=True)
class PlaceLogprobs:
    """Log-probabilities at one place of an answer: of the token there, and of the likeliest ones,
    by id, largest first."""

    value: float
    top: dict[int, float]


@dataclass
class LogprobWarper:
    """A processor that changes nothing and notes the log-probabilities at each place, as the model
    gave them: before temperature and top-p, after penalties.

    A place that an exit filled with a guess is noted again when the full model fills it. Its name
    ends as those of processors that say nothing of what may come, so an exit's score is the same
    with it.
    """

    top: int
    places: list[PlaceLogprobs] = field(default_factory=list)
    _prompt: int | None = None
    _open: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if self._prompt is None:
            self._prompt = ids.shape[1]
        self._open[ids.shape[1] - self._prompt] = scores[0].float().log_softmax(-1)
        return scores

    def settle(self, token: int) -> None:
        """The next place holds `token`, whatever was tried there."""
        logs = self._open.pop(len(self.places))
        top = logs.topk(min(self.top, len(logs)))
        likeliest = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        self.places.append(PlaceLogprobs(float(logs[token]), likeliest))


@dataclass(frozen=True)
class Generation:
    """How one answer is generated. logprobs: what notes them, if they are wanted. plain: greedy
    and with no rule of its own, so that what is guaranteed of the adapter's answers holds of it."""

    options: Mapping[str, Any]
    seed: int | None
    longest: int
    logprobs: LogprobWarper | None
    plain: bool


def longest_answer(asked: int | None, room: int, prompt: int, usual: int) -> int:
    """Tokens of the longest answer, where the slot has `room` left behind the prompt.

    Raises:
        ApiError: the prompt, or the prompt and what was asked for, does not fit.
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


def generation(
    request: Sampling,
    model: Any,
    tokenizer: Any,
    config: ServerConfig,
    *,
    prompt: int,
    room: int,
    choice: int = 0,
    constraint: Constraint | None = None,
) -> Generation:
    """The options for the answer number `choice` to a prompt.

    model: whose generation configuration fills what the request leaves out. prompt: its
    tokens. room: tokens left behind them. constraint: which tokens may come.
    """
    defaults = model.generation_config
    usual = getattr(defaults, "max_new_tokens", None) or config.default_tokens
    longest = longest_answer(request.longest, room, prompt, usual)
    options: dict[str, Any] = {"max_new_tokens": longest, "num_beams": 1}
    if request.ignore_eos:
        options["min_new_tokens"] = longest
    sampled = request.temperature is not None or request.top_p is not None
    if request.temperature is not None and request.temperature < GREEDY_BELOW:
        options["do_sample"] = False
    elif sampled or request.top_k is not None:
        temperature = 1.0 if request.temperature is None else request.temperature
        top_p = 1.0 if request.top_p is None else request.top_p
        options |= {"do_sample": True, "temperature": temperature, "top_p": top_p}
        options["top_k"] = max(request.top_k or 0, 0)
    if request.repetition_penalty != 1.0:
        options["repetition_penalty"] = request.repetition_penalty
    processors: list[Any] = []
    if request.presence_penalty or request.frequency_penalty:
        penalties = (request.presence_penalty, request.frequency_penalty)
        processors.append(CountPenalties(*penalties))
    if constraint is not None:
        processors.append(constraint)
    wanted = request.top_logprobs_wanted
    noted = None if wanted is None else LogprobWarper(wanted)
    if noted is not None:
        processors.append(noted)
    if processors:
        options["logits_processor"] = processors
    if request.stops:
        options["stopping_criteria"] = [StopStrings(tokenizer, request.stops)]
    samples = options.get("do_sample", bool(getattr(defaults, "do_sample", False)))
    rules = {"repetition_penalty", "logits_processor", "stopping_criteria", "min_new_tokens"}
    plain = not samples and not rules & options.keys()
    seed = None if request.seed is None else (request.seed + choice) % 2**63
    return Generation(options, seed, longest, noted, plain)
