"""A chain of segments as what an engine writes with, without PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from offramp.engine.confidence import check_thresholds
from offramp.engine.decoding.executor import Executor, check_context
from offramp.engine.decoding.plan import Plan
from offramp.engine.decoding.reader import ReadsPrompts
from offramp.engine.decoding.sequence import Sequence
from offramp.engine.policy import ExitPolicy, check_exact
from offramp.runtimes.edge.sampling import Sampler
from offramp.runtimes.edge.vocabulary import Vocabulary
from offramp.runtimes.llama_cpp.array_reader import ArrayHeads, Ids
from offramp.runtimes.llama_cpp.chain import SegmentChain
from offramp.runtimes.llama_cpp.drafter import ChainDrafter
from offramp.runtimes.llama_cpp.native.tap import States
from offramp.runtimes.llama_cpp.plan import chain_plan
from offramp.serving.host import OnSettled, Opened
from offramp.serving.request import Request


class EdgeHost:
    """As of `Host`. A request's inputs are a `Prompt` and the ids of its text (`prompt`, `ids`),
    its options those of `Sampler`."""

    def __init__(
        self,
        chain: SegmentChain,
        drafter: ChainDrafter | None,
        policy: ExitPolicy,
        vocabulary: Vocabulary,
        embed: Callable[[int, int], States],
        *,
        layers: int,
        depths: tuple[int, ...],
        shortlist: Ids | None,
        causal: bool,
        context: int,
    ) -> None:
        """depths: of the chain's exits. causal: whether prompts may wait at an exit. context:
        tokens that get a place.

        Raises:
            InputError: a policy that does not run here.
        """
        for at in (policy.thresholds, policy.first, policy.drafts):
            check_thresholds(dict(at), depths)
        check_exact(policy, "llama.cpp")
        self._policy, self._depths, self._layers = policy, depths, layers
        self._chain, self._drafter, self._embed = chain, drafter, embed
        self._vocabulary, self._causal, self._context = vocabulary, causal, context
        self._shortlist = shortlist
        self._alone = chain.slots == 1
        self._planned = policy
        self.plan = self._plan(policy, every_mode=not self._alone)

    def _plan(self, policy: ExitPolicy, *, every_mode: bool) -> Plan:
        return chain_plan(
            self._layers, policy, lambda depths: ArrayHeads(self._policy, self._shortlist),
            self._chain, self._depths, self._embed, drafter=self._drafter,
            first_may_exit=policy.exit_in_prefill and self._causal, every_mode=every_mode,
        )  # fmt: skip

    def executor(self) -> Executor:
        self._executor = self.plan.executor()
        return self._executor

    def stale(self) -> bool:
        return False

    def renew(self, request: Request) -> bool:
        """An answer that is written alone is written by what it needs, and no more."""
        if not self._alone:
            return False
        asked = self._policy.asked(request.mode, request.thresholds, self._depths)
        if asked == self._planned:
            return False
        self._planned, self.plan = asked, self._plan(asked, every_mode=False)
        return True

    def tokens(self, request: Request) -> int:
        tokens = len(request.inputs["prompt"].states)
        check_context(tokens, request.options["max_new_tokens"], self._context)
        return tokens

    def positions(self, prompt: int) -> int | None:
        return None

    def open(self, request: Request, on_token: OnSettled) -> Opened:
        prompt, options = request.inputs["prompt"], dict(request.options)
        longest, reader = options.pop("max_new_tokens"), cast(ReadsPrompts, self._executor)
        sampler = Sampler(
            options.pop("sampling"), self._vocabulary.size, request.inputs["ids"], most=longest,
            ends=self._vocabulary.ends, on_token=on_token, seed=request.seed, **options,
        )  # fmt: skip
        return Opened(reader, prompt, sampler, longest, None)

    def output(self, ids: Any, sequence: Sequence) -> None:
        return None
