"""Token after token through a chain of segments: early exits, and lossless drafts.

The rules of `offramp.engine.generate` and `offramp.engine.speculative`, for one row: exits are
looked at by the same scores, and what comes next is chosen by Hugging Face's own processors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from offramp.adapter import Adapter
from offramp.engine.confidence import logits_score
from offramp.engine.exit_check import gates_of_policy, shortlist_of_policy
from offramp.engine.policy import ExitPolicy
from offramp.engine.prefill import Prepared
from offramp.engine.sampling import SequenceState
from offramp.engine.speculative import Draft, verify
from offramp.runtimes.llama_cpp.chain import Array, SegmentChain
from offramp.runtimes.llama_cpp.tap import States


class GreedyRow(SequenceState):
    """One greedy row without processors: what costs a small model a tenth of a token is left out.

    Token ids lie in one buffer, logits are not copied, and ends are looked up as numbers.
    """

    def __init__(self, prepared: Prepared, streamer: Any = None) -> None:
        super().__init__(prepared, streamer)
        known = (MaxLengthCriteria, EosTokenCriteria)
        self._others = [c for c in self._criteria if type(c) not in known]
        self._longest: int | None = self._criteria.max_length
        self._ends = frozenset([] if self._eos is None else self._eos.tolist())
        self._buffer = prepared.ids.new_zeros(1, 2 * prepared.ids.shape[1] + 64)
        self._buffer[:, : self.ids.shape[1]] = self.ids
        self._live = 1
        self._one = torch.ones(1, dtype=torch.bool)

    @classmethod
    def fits(cls, prepared: Prepared) -> bool:
        """Whether the next token is the largest logit, whatever stands before it."""
        return len(prepared.ids) == 1 and not prepared.config.do_sample and not prepared.processors

    @property
    def live(self) -> int:
        return self._live

    def process(self, logits: Tensor, ids: Tensor | None = None) -> Tensor:
        return logits

    def emit(self, tokens: Tensor, depths: Tensor, scores: Tensor) -> None:
        length = self.ids.shape[1]
        if length == self._buffer.shape[1]:
            self._buffer = torch.cat([self._buffer, torch.zeros_like(self._buffer)], 1)
        self._buffer[0, length] = tokens[0]
        self.ids = self._buffer[:, : length + 1]
        self.trace.append((self._one, depths, scores))
        if self._streamer is not None:
            self._streamer.put(tokens.cpu())
        stops = [bool(stop(self.ids, None)) for stop in self._others]
        self._live = int(not (self.would_end(self.ids) or any(stops)))

    def would_end(self, ids: Tensor) -> bool:
        if self._longest is not None and ids.shape[1] >= self._longest:
            return True
        return bool(self._ends) and int(ids[0, -1]) in self._ends


class ExitLook:
    """Decides at each exit, and remembers what the last check of a token saw.

    depth: where the current token exited, or the full depth. score: of its last check, or NaN.
    few: logits [1, S] of what the exit can say, if the token exited there.
    """

    def __init__(self, adapter: Adapter, policy: ExitPolicy, depths: tuple[int, ...]) -> None:
        """depths: of the chain's exits, in order."""
        self._depths = depths
        self._layers = adapter.backbone.depth
        self._vocabulary = adapter.backbone.vocabulary
        self._thresholds = dict(policy.thresholds)
        self._shortlist = shortlist_of_policy(policy, adapter.exits)
        self._gates = gates_of_policy(policy, adapter.exits)
        score = logits_score(policy.score, tuple(self._thresholds), policy.weights)
        assert score is not None
        self._rule = score
        self.constrain: Callable[[Tensor], Tensor] | None = None
        self.depth, self.score = self._layers, math.nan
        self.few: Tensor | None = None

    def begin(self) -> None:
        """A new token."""
        self.depth, self.score, self.few = self._layers, math.nan, None

    def __call__(self, exit: int, state: Array, logits: Array) -> bool:
        """Whether the token exits at this exit of the chain; see `Decide`."""
        depth = self._depths[exit]
        threshold = self._thresholds.get(depth)
        if threshold is None:
            return False
        if depth in self._gates:
            gate, level = self._gates[depth]
            if not bool(gate(torch.from_numpy(state)[None]) >= level):
                return False
        few = torch.from_numpy(logits)[None]
        if threshold == 0.0:
            self.score = math.nan
        else:
            score = self._rule(depth, self._allowed(few))
            self.score = float(score)
            if not bool(score >= threshold):
                return False
        self.depth, self.few = depth, few
        return True

    @property
    def logits(self) -> Tensor:
        """[1, V], of a token that exited."""
        assert self.few is not None
        return self._whole(self.few)

    @property
    def largest(self) -> Tensor:
        """The token id [1] of the largest logit, of a token that exited."""
        assert self.few is not None
        place = self.few.argmax(-1)
        return place if self._shortlist is None else self._shortlist[place]

    def _whole(self, few: Tensor) -> Tensor:
        """Logits [1, V] of logits [1, S] of the shortlist."""
        if self._shortlist is None:
            return few
        whole = few.new_full((1, self._vocabulary), -torch.inf)
        return whole.index_copy_(1, self._shortlist, few)

    def _allowed(self, few: Tensor) -> Tensor:
        """Logits [1, S] under the constraints: a score is confidence in what may be said."""
        if self.constrain is None:
            return few
        whole = self.constrain(self._whole(few))
        return whole if self._shortlist is None else whole[:, self._shortlist]


class Decoder:
    """One generation."""

    def __init__(
        self,
        chain: SegmentChain,
        look: ExitLook,
        loop: SequenceState,
        embed: Callable[[Tensor], States],
        policy: ExitPolicy,
    ) -> None:
        """embed: the states [1, D] that enter the decoder for token ids [1, 1]."""
        self.chain = chain
        self.look = look
        self.loop = loop
        self.embed = embed
        self.policy = policy
        self.layers = look.depth
        self.greedy = isinstance(loop, GreedyRow)
        look.constrain = loop.constraints(lambda: loop.ids)

    def decode(self, prompt: States) -> None:
        """Write until the row is finished. prompt: states [T, D] that enter the decoder."""
        first = self.look if self.policy.exit_in_prefill and self.policy.thresholds else None
        self._emit(prompt, first)
        while self.loop.live:
            self._emit(self.embed(self.loop.ids[:, -1:]), self.look)

    def _emit(self, states: States, look: ExitLook | None) -> None:
        """Run `states`, and write the token after them."""
        seen, loop = self.look, self.loop
        seen.begin()
        self.chain.run(states, look)
        if seen.few is None:
            token = loop.choose(torch.from_numpy(self.chain.finish(1)))
        else:
            token = seen.largest if self.greedy else loop.choose(seen.logits)
        loop.emit(token, torch.tensor([seen.depth]), torch.tensor([seen.score]))

    # -- lossless -----------------------------------------------------------------------------

    def speculate(self, prompt: States) -> list[tuple[int, int]]:
        """Write what the full model would; return (drafted, accepted) of each round."""
        self._emit(prompt, None)
        rounds = []
        while self.loop.live:
            drafts, logits = self._draft()
            written, accepted = self._verify(drafts, logits)
            rounds.append((len(drafts), accepted))
            self.chain.crop(len(logits) - written)
        return rounds

    def _draft(self) -> tuple[list[Draft], Tensor]:
        """Drafts as long as an exit is sure, and the full model's logits [n, V] at all n tokens."""
        loop, look = self.loop, self.look
        ids, fed, drafts = loop.ids, 0, list[Draft]()
        look.constrain = loop.constraints(lambda: ids)
        while True:
            look.begin()
            may_leave = len(drafts) < self.policy.max_draft
            self.chain.run(self.embed(ids[:, -1:]), look if may_leave else None)
            fed += 1
            if look.few is None:
                break
            probabilities = None
            if self.greedy:
                token = look.largest
            else:
                scores = loop.process(look.logits, ids)
                token = loop.draw(scores)
                probabilities = scores.softmax(-1) if loop.samples else None
            drafts.append(
                Draft(token, torch.tensor([look.depth]), torch.tensor([look.score]), probabilities)
            )
            ids = torch.cat([ids, token[:, None]], 1)
            if loop.would_end(ids):
                break
        return drafts, torch.from_numpy(self.chain.finish(fed))

    def _verify(self, drafts: list[Draft], logits: Tensor) -> tuple[int, int]:
        """Write what the full model agrees to, and its own token after it.

        Returns how many tokens were written, and how many of them were drafts.
        """
        loop, full = self.loop, torch.tensor([self.layers])
        accepted = 0
        for place in range(len(logits)):
            scores = loop.process(logits[place : place + 1])
            if place == len(drafts):
                loop.emit(loop.draw(scores), full, torch.tensor([self.look.score]))
                return place + 1, accepted
            draft = drafts[place]
            token, accepts = verify(draft, scores)
            agreed = bool(accepts)
            accepted += agreed
            loop.emit(token, draft.depths if agreed else full, draft.scores)
            if not agreed or not loop.live:
                return place + 1, accepted
        return len(logits), accepted
