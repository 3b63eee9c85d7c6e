"""A request's fields as Hugging Face's generation options."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from offramp.core.engine.sampler import Constraint
from offramp.serving.server.api.options import (
    Generation,
    NotedLogprobs,
    PlaceLogprobs,
    longest_answer,
    sampled_by,
    seed_of,
)
from offramp.serving.server.api.protocol import Sampling
from offramp.serving.server.api.text import StopStrings
from offramp.serving.server.config import ServerConfig


class CountPenalties:
    """OpenAI's penalties: a token of the answer loses `presence` once and `frequency` for each
    occurrence."""

    def __init__(self, presence: float, frequency: float) -> None:
        self._presence, self._frequency = presence, frequency
        self._prompt: int | None = None  # the first call has nothing after it

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if self._prompt is None:
            self._prompt = ids.shape[1]
        written = ids[:, self._prompt :]
        ones = torch.ones_like(written, dtype=scores.dtype)
        counts = torch.zeros_like(scores).scatter_add_(1, written, ones)
        return scores - self._frequency * counts - self._presence * (counts > 0)


@dataclass
class LogprobWarper(NotedLogprobs):
    """A processor that only records the log-probabilities at each place, as the model gave them:
    before temperature and top-p, after penalties.

    Where an exit was asked without writing a token, the full model's replace them. The class's name
    ends in "Warper", because an exit's score ignores such processors.
    """

    _prompt: int | None = None
    _open: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if self._prompt is None:
            self._prompt = ids.shape[1]
        self._open[ids.shape[1] - self._prompt] = scores[0].float().log_softmax(-1)
        return scores

    def settle(self, token: int) -> None:
        logs = self._open.pop(len(self.places))
        top = logs.topk(min(self.top, len(logs)))
        likeliest = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        self.places.append(PlaceLogprobs(float(logs[token]), likeliest))


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
    """Return the options of answer number `choice` to a prompt.

    model: its generation configuration fills what the request leaves out. prompt: number of its
    tokens. room: tokens left after the prompt. constraint: on the tokens that may come.
    """
    defaults = model.generation_config
    usual = getattr(defaults, "max_new_tokens", None) or config.default_tokens
    longest = longest_answer(request.longest, room, prompt, usual)
    options: dict[str, Any] = {"max_new_tokens": longest, "num_beams": 1}
    if request.ignore_eos:
        options["min_new_tokens"] = longest
    drawn = sampled_by(request)
    if drawn is not None:
        options["do_sample"] = drawn.temperature > 0
    if drawn is not None and drawn.temperature > 0:
        options |= asdict(drawn)
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
    return Generation(options, seed_of(request, choice), longest, noted, plain)
