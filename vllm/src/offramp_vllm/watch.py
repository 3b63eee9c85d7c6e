"""The watch: a share of early answers is written again at full depth when they are over, after the
requests of users where vLLM schedules by priority, and counted by whether it is the same."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from offramp_vllm.policy import EARLY, FULL, MODE, THRESHOLD, Asked

OURS = "offramp-"
"""How the ids of requests begin that no user has asked for: the watch's, and the check's at
start."""
COPY = f"{OURS}watch-"
AT_ONCE = 16
"""Copies that may wait or run; where as many do, an answer is not drawn."""


class Watch:
    """Of one scheduler."""

    def __init__(self, asked: Callable[[Any], Asked], share: float, *, priority: bool) -> None:
        """asked: what a request asks for, by its extra arguments. share: of early answers.
        priority: whether requests are scheduled by it."""
        self._asked, self._share = asked, share
        self._later = int(priority)
        self._draw = random.Random()
        self._early: dict[str, list[int]] = {}

    def over(self, requests: Iterable[Any]) -> Iterator[Any]:
        """Copies to be written at full depth, of requests [...] that are over."""
        for request in requests:
            room = len(self._early) < AT_ONCE
            if room and self._draw.random() < self._share and self._watches(request):
                yield self._again(request)

    def same(self, request: Any) -> bool | None:
        """Whether a copy that is over is the early answer; None: the request is no copy."""
        early = self._early.pop(request.request_id, None)
        return None if early is None else early == list(request.output_token_ids)

    def _watches(self, request: Any) -> bool:
        """Whether it was answered greedily and early by the adapter's own thresholds, and nothing
        but its prompt made a difference."""
        params = request.sampling_params
        ours = request.request_id.startswith(OURS)
        if ours or params is None or params.temperature or params.structured_outputs is not None:
            return False
        extra = params.extra_args or {}
        early = self._asked(extra).mode == EARLY
        return early and THRESHOLD not in extra and not request.resumable

    def _again(self, request: Any) -> Any:
        params = copy.copy(request.sampling_params)
        params.extra_args = {MODE: FULL}
        params.logprobs = params.prompt_logprobs = None
        again = type(request)(
            request_id=COPY + request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            sampling_params=params,
            pooling_params=None,
            client_index=request.client_index,
            prompt_embeds=request.prompt_embeds,
            prompt_is_token_ids=request.prompt_is_token_ids,
            mm_features=request.mm_features,
            cache_salt=request.cache_salt,
            priority=request.priority + self._later,
            block_hasher=request._block_hasher,
        )
        self._early[again.request_id] = list(request.output_token_ids)
        return again
