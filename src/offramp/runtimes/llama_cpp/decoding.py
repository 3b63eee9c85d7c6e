"""Token after token through a chain of segments: early exits, and lossless drafts.

The rules of `offramp.engine.generate` and `offramp.engine.speculative`, for one row: exits are
looked at by the same scores, and what comes next is chosen by Hugging Face's own processors.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from offramp.adapter import Adapter
from offramp.engine.confidence import logits_score
from offramp.engine.exit_check import gates_of_policy, shortlist_of_policy
from offramp.engine.policy import ExitPolicy
from offramp.engine.sampling import SequenceState
from offramp.engine.speculative import Draft, verify
from offramp.runtimes.greedy_row import GreedyRow
from offramp.runtimes.llama_cpp.chain import Array, SegmentChain
from offramp.runtimes.llama_cpp.tap import States


class ChainDecider:
    """Decides at each exit, and remembers what the last check of a token saw.

    depth: where the current token exited, or the full depth. score: of its last check, or NaN.
    exit_logits: logits [1, S] of what the exit can say, if the token exited there.
    """

    def __init__(self, adapter: Adapter, policy: ExitPolicy, depths: tuple[int, ...]) -> None:
        """depths: of the chain's exits, in order."""
        self._depths = depths
        self._layers = adapter.backbone.depth
        self._vocabulary = adapter.backbone.vocabulary
        # In the scores' precision, in which they are compared.
        self._thresholds = {d: float(np.float32(t)) for d, t in policy.thresholds.items()}
        self._shortlist = shortlist_of_policy(policy, adapter.exits)
        self._gates = gates_of_policy(policy, adapter.exits)
        score = logits_score(policy.score, tuple(self._thresholds), policy.weights)
        assert score is not None
        self._rule = score
        self.constrain: Callable[[Tensor], Tensor] | None = None
        self.depth, self.score = self._layers, math.nan
        self.exit_logits: Tensor | None = None

    def begin(self) -> None:
        """A new token."""
        self.depth, self.score, self.exit_logits = self._layers, math.nan, None

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
        exit_logits = torch.from_numpy(logits)[None]
        if threshold == 0.0:
            self.score = math.nan
        else:
            self.score = float(self._rule(depth, self._allowed(exit_logits)))
            if not self.score >= threshold:  # NaN is not either
                return False
        self.depth, self.exit_logits = depth, exit_logits
        return True

    @property
    def logits(self) -> Tensor:
        """[1, V], of a token that exited."""
        assert self.exit_logits is not None
        return self._whole(self.exit_logits)

    @property
    def largest(self) -> Tensor:
        """The token id [1] of the largest logit, of a token that exited."""
        assert self.exit_logits is not None
        place = self.exit_logits.argmax(-1)
        return place if self._shortlist is None else self._shortlist[place]

    def _whole(self, exit_logits: Tensor) -> Tensor:
        """Logits [1, V] of logits [1, S] of the shortlist."""
        if self._shortlist is None:
            return exit_logits
        whole = exit_logits.new_full((1, self._vocabulary), -torch.inf)
        return whole.index_copy_(1, self._shortlist, exit_logits)

    def _allowed(self, exit_logits: Tensor) -> Tensor:
        """Logits [1, S] under the constraints: a score is confidence in what may be said."""
        if self.constrain is None:
            return exit_logits
        whole = self.constrain(self._whole(exit_logits))
        return whole if self._shortlist is None else whole[:, self._shortlist]


class Decoder:
    """One generation."""

    def __init__(
        self,
        chain: SegmentChain,
        decider: ChainDecider,
        sequence: SequenceState,
        embed: Callable[[Tensor], States],
        policy: ExitPolicy,
    ) -> None:
        """embed: the states [1, D] that enter the decoder for token ids [1, 1]."""
        self.chain = chain
        self.decider = decider
        self.sequence = sequence
        self.embed = embed
        self.policy = policy
        self.layers = decider.depth
        self.greedy = isinstance(sequence, GreedyRow)
        decider.constrain = sequence.constraints(lambda: sequence.ids)

    def decode(self, prompt: States) -> None:
        """Write until the row is finished. prompt: states [T, D] that enter the decoder."""
        first = self.decider if self.policy.exit_in_prefill and self.policy.thresholds else None
        self._emit(prompt, first)
        while self.sequence.live:
            self._emit(self.embed(self.sequence.ids[:, -1:]), self.decider)

    def _emit(self, states: States, decide: ChainDecider | None) -> None:
        """Run `states`, and write the token after them."""
        decider, sequence = self.decider, self.sequence
        decider.begin()
        self.chain.run(states, decide)
        if decider.exit_logits is None:
            token = sequence.choose(torch.from_numpy(self.chain.finish(1)))
        else:
            token = decider.largest if self.greedy else sequence.choose(decider.logits)
        sequence.emit(token, torch.tensor([decider.depth]), torch.tensor([decider.score]))

    # -- lossless -----------------------------------------------------------------------------

    def speculate(self, prompt: States) -> list[tuple[int, int]]:
        """Write what the full model would; return (drafted, accepted) of each round."""
        self._emit(prompt, None)
        rounds = []
        while self.sequence.live:
            drafts, logits = self._draft()
            written, accepted = self._verify(drafts, logits)
            rounds.append((len(drafts), accepted))
            self.chain.crop(len(logits) - written)
        return rounds

    def _draft(self) -> tuple[list[Draft], Tensor]:
        """Drafts as long as an exit is sure, and the full model's logits [n, V] at all n tokens."""
        sequence, decider = self.sequence, self.decider
        ids, fed, drafts = sequence.ids, 0, list[Draft]()
        decider.constrain = sequence.constraints(lambda: ids)
        while True:
            decider.begin()
            may_exit = len(drafts) < self.policy.max_draft
            self.chain.run(self.embed(ids[:, -1:]), decider if may_exit else None)
            fed += 1
            if decider.exit_logits is None:
                break
            probabilities = None
            if self.greedy:
                token = decider.largest
            else:
                scores = sequence.process(decider.logits, ids)
                token = sequence.draw(scores)
                probabilities = scores.softmax(-1) if sequence.samples else None
            drafts.append(
                Draft(
                    token,
                    torch.tensor([decider.depth]),
                    torch.tensor([decider.score]),
                    probabilities,
                )
            )
            ids = torch.cat([ids, token[:, None]], 1)
            if sequence.would_end(ids):
                break
        return drafts, torch.from_numpy(self.chain.finish(fed))

    def _verify(self, drafts: list[Draft], logits: Tensor) -> tuple[int, int]:
        """Write what the full model agrees to, and its own token after it.

        Returns how many tokens were written, and how many of them were drafts.
        """
        sequence, full = self.sequence, torch.tensor([self.layers])
        accepted = 0
        for place in range(len(logits)):
            scores = sequence.process(logits[place : place + 1])
            if place == len(drafts):
                sequence.emit(sequence.draw(scores), full, torch.tensor([self.decider.score]))
                return place + 1, accepted
            draft = drafts[place]
            token, accepts = verify(draft, scores)
            agreed = bool(accepts)
            accepted += agreed
            sequence.emit(token, draft.depths if agreed else full, draft.scores)
            if not agreed or not sequence.live:
                return place + 1, accepted
        return len(logits), accepted
