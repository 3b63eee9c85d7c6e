"""Token after token through a chain of segments: early exits, and lossless drafts.

The rules of `offramp.engine.generate` and `offramp.engine.speculative`, for one row: exits are
looked at by the same scores, and what comes next is chosen by Hugging Face's own processors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offramp.adapter import Adapter
from offramp.engine.confidence import SCORES, logits_score, max_probability
from offramp.engine.exit_check import gates_of_policy, shortlist_of_policy
from offramp.engine.policy import ExitPolicy
from offramp.engine.speculative import Draft, verify
from offramp.runtimes.llama_cpp.chain import Array, SegmentChain
from offramp.runtimes.llama_cpp.native.tap import States
from offramp.runtimes.one_row import GreedyRow, OneRow


class ChainDecider:
    """Decides at each exit, and remembers what the last check of a token saw.

    depth: where the current token exited, or the full depth. score: of its last check, or NaN.
    exit_logits: logits [S] of what the exit can say, if the token exited there.
    """

    def __init__(self, adapter: Adapter, policy: ExitPolicy, depths: tuple[int, ...]) -> None:
        """depths: of the chain's exits, in order."""
        self._depths = depths
        self._layers = adapter.backbone.depth
        self._vocabulary = adapter.backbone.vocabulary
        # In the scores' precision, in which they are compared.
        self._thresholds = {d: float(np.float32(t)) for d, t in policy.thresholds.items()}
        self._shortlist = shortlist_of_policy(policy, adapter.exits)
        self._ids = None if self._shortlist is None else self._shortlist.tolist()
        self._gates = gates_of_policy(policy, adapter.exits)
        score = logits_score(policy.score, tuple(self._thresholds), policy.weights)
        assert score is not None
        self._rule = score
        self._plain = SCORES.get(policy.score) is max_probability
        self.constrain: Callable[[Tensor], Tensor] | None = None
        self.depth, self.score = self._layers, math.nan
        self.exit_logits: Array | None = None

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
        if threshold == 0.0:
            self.score = math.nan
        else:
            self.score = self._score(depth, logits)
            if not self.score >= threshold:  # NaN is not either
                return False
        self.depth, self.exit_logits = depth, logits
        return True

    def _score(self, depth: int, logits: Array) -> float:
        if self._plain and self.constrain is None:  # a third of the rule's time, see `GreedyRow`
            return 1.0 / float(np.add.reduce(np.exp(logits - logits.max())))
        return float(self._rule(depth, self._allowed(torch.from_numpy(logits)[None])))

    @property
    def logits(self) -> Tensor:
        """[1, V], of a token that exited."""
        assert self.exit_logits is not None
        return self._whole(torch.from_numpy(self.exit_logits)[None])

    @property
    def largest(self) -> int:
        """The token id of the largest logit, of a token that exited."""
        assert self.exit_logits is not None
        place = int(self.exit_logits.argmax())
        return place if self._ids is None else int(self._ids[place])

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


@dataclass(frozen=True)
class Drafted:
    """A token that is not given out yet. probabilities: [1, V] it was sampled from, if it was."""

    token: int
    depth: int
    score: float
    probabilities: Tensor | None


class Decoder:
    """One generation."""

    def __init__(
        self,
        chain: SegmentChain,
        decider: ChainDecider,
        sequence: OneRow,
        embed: Callable[[int], States],
        policy: ExitPolicy,
    ) -> None:
        """embed: the states [1, D] that enter the decoder for a token."""
        self.chain = chain
        self.decider = decider
        self.sequence = sequence
        self.embed = embed
        self.policy = policy
        self.layers = decider.depth
        self.greedy = isinstance(sequence, GreedyRow)
        self._drafts: list[Drafted] = []
        decider.constrain = sequence.constraints(lambda: sequence.after(self._drafted))

    def decode(self, prompt: States) -> None:
        """Write until the row is finished. prompt: states [T, D] that enter the decoder."""
        first = self.decider if self.policy.exit_in_prefill and self.policy.thresholds else None
        self._step(prompt, first)
        while self.sequence.live:
            self._step(self.embed(self.sequence.last), self.decider)

    def _step(self, states: States, decide: ChainDecider | None) -> None:
        """Run `states`, and write the token after them."""
        decider = self.decider
        decider.begin()
        self.chain.run(states, decide)
        if decider.exit_logits is None:
            token, _ = self._full_token(self.chain.finish(1)[0])
        else:
            token, _ = self._exit_token()
        self.sequence.write(token, decider.depth, decider.score)

    @property
    def _drafted(self) -> list[int]:
        return [draft.token for draft in self._drafts]

    def _exit_token(self) -> tuple[int, Tensor | None]:
        """The token that exited, and what it was sampled from, if it was."""
        if self.greedy:
            return self.decider.largest, None
        sequence = self.sequence
        scores = sequence.process(self.decider.logits, sequence.after(self._drafted))
        return int(sequence.draw(scores)), scores.softmax(-1) if sequence.samples else None

    def _full_token(self, logits: Array, draft: Drafted | None = None) -> tuple[int, bool]:
        """The full model's token, of its logits [V], and whether it agrees to the draft there."""
        if self.greedy:
            token = int(logits.argmax())
            return token, draft is not None and token == draft.token
        scores = self.sequence.process(torch.from_numpy(logits)[None])
        if draft is None:
            return int(self.sequence.draw(scores)), False
        tokens, agrees = verify(draft_tensors(draft), scores)
        return int(tokens), bool(agrees)

    # -- lossless -----------------------------------------------------------------------------

    def speculate(self, prompt: States) -> list[tuple[int, int]]:
        """Write what the full model would; return (drafted, accepted) of each round."""
        self._step(prompt, None)
        rounds = []
        while self.sequence.live:
            logits = self._draft()
            drafts, self._drafts = self._drafts, []
            written, accepted = self._verify(drafts, logits)
            rounds.append((len(drafts), accepted))
            self.chain.crop(len(logits) - written)
        return rounds

    def _draft(self) -> Array:
        """Draft as long as an exit is sure; the full model's logits [n, V] at all n tokens."""
        sequence, decider, drafts = self.sequence, self.decider, self._drafts
        last, fed = sequence.last, 0
        while True:
            decider.begin()
            self.chain.run(self.embed(last), decider if fed < self.policy.max_draft else None)
            fed += 1
            if decider.exit_logits is None:
                break
            last, probabilities = self._exit_token()
            drafts.append(Drafted(last, decider.depth, decider.score, probabilities))
            if sequence.ends(self._drafted):
                break
        return self.chain.finish(fed)

    def _verify(self, drafts: Sequence[Drafted], logits: Array) -> tuple[int, int]:
        """Write what the full model agrees to, and its own token after it.

        Returns how many tokens were written, and how many of them were drafts.
        """
        accepted = 0
        for place, row in enumerate(logits):
            draft = drafts[place] if place < len(drafts) else None
            token, agreed = self._full_token(row, draft)
            accepted += agreed
            depth = draft.depth if draft is not None and agreed else self.layers
            score = self.decider.score if draft is None else draft.score
            self.sequence.write(token, depth, score)
            if not agreed or not self.sequence.live:
                return place + 1, accepted
        return len(logits), accepted


def draft_tensors(draft: Drafted) -> Draft:
    """As `offramp.engine.speculative` has it."""
    token, depth, score = (torch.tensor([v]) for v in (draft.token, draft.depth, draft.score))
    return Draft(token, depth, score, draft.probabilities)
