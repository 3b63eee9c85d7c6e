"""A chain of segments as what an engine writes with, without PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np

from offramp.core.decoding.executor import Executor
from offramp.core.decoding.plan import Plan
from offramp.core.decoding.policy import ExitPolicy, check_policy_depths
from offramp.core.decoding.reader import PrefillBackend
from offramp.core.decoding.sequence import Sequence
from offramp.serving.host import OnSettled, Opened
from offramp.serving.request import Request
from offramp_llama_cpp.array_reader import ArrayHeads
from offramp_llama_cpp.edge.sampling import Sampler
from offramp_llama_cpp.edge.vocabulary import Vocabulary
from offramp_llama_cpp.native.tap import States
from offramp_llama_cpp.opened import OpenedFiles
from offramp_llama_cpp.prompt import check_context


class EdgeHost:
    """The `Host` of a model without PyTorch. A request's inputs are a `Prompt` and the ids of its
    text (`prompt`, `ids`), its options those of `Sampler`."""

    def __init__(
        self,
        opened: OpenedFiles,
        policy: ExitPolicy,
        vocabulary: Vocabulary,
        embed: Callable[[int, int], States],
    ) -> None:
        """opened: joined. embed: the states [1, D] that a token enters as, by its id and position.

        Raises:
            InputError: a policy that does not run here.
        """
        depths, ids, first = opened.files.depths, opened.files.shortlist, opened.segments[0]
        check_policy_depths(policy, depths)
        self._opened, self._policy, self._vocabulary = opened, policy, vocabulary
        self._embed, self._depths, self._context = embed, depths, opened.engine.context
        self._heads = ArrayHeads(policy, None if ids is None else np.asarray(ids, dtype=np.int64))
        self._causal = not first.looks_ahead and first.features == 0
        self._alone = opened.chain.slots == 1
        self._planned = policy
        self.plan = self._plan(policy)

    def _plan(self, policy: ExitPolicy) -> Plan:
        may_exit = policy.exit_in_prefill and self._causal  # where a prompt may wait at an exit
        return self._opened.plan(
            policy,
            lambda depths: self._heads,
            self._embed,
            first_may_exit=may_exit,
            every_mode=not self._alone,
        )

    def executor(self) -> Executor:
        self._executor = self.plan.executor()
        return self._executor

    def stale(self, request: Request) -> bool:
        return False

    def alone(self, request: Request, streamer: Any, check_room: Any) -> None:
        return None

    def renew(self, request: Request) -> bool:
        """An answer that is written alone is written by what it needs, and no more."""
        if not self._alone:
            return False
        asked = self._policy.asked(request.mode, request.thresholds, self._depths, request.point)
        if asked == self._planned:
            return False
        self._planned, self.plan = asked, self._plan(asked)
        return True

    def tokens(self, request: Request) -> int:
        tokens = len(request.inputs["prompt"].states)
        check_context(tokens, request.options["max_new_tokens"], self._context)
        return tokens

    def positions(self, prompt: int) -> int | None:
        return None

    def open(self, request: Request, on_token: OnSettled) -> Opened:
        prompt, options = request.inputs["prompt"], dict(request.options)
        longest, reader = options.pop("max_new_tokens"), cast(PrefillBackend, self._executor)
        sampler = Sampler(
            options.pop("sampling"),
            self._vocabulary.size,
            request.inputs["ids"],
            most=longest,
            ends=self._vocabulary.ends,
            on_token=on_token,
            seed=request.seed,
            **options,
        )
        return Opened(reader, prompt, sampler, longest, None)

    def output(self, ids: Any, sequence: Sequence) -> None:
        return None
