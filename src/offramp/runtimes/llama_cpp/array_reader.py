"""What exits and the full model of a chain say next, in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.engine.decoding.reader import Looks, Question, Word, anyone
from offramp.engine.decoding.rule import CLOSED, Verdict
from offramp.engine.policy import ExitPolicy
from offramp.errors import InputError, did_you_mean
from offramp.runtimes.llama_cpp.executor import ChainOutput
from offramp.runtimes.llama_cpp.graphs import Array

Ids = npt.NDArray[np.int64]


def _probabilities(logits: Array, top: float) -> Array:
    shares = np.exp(logits - top)
    return np.asarray(shares / shares.sum(), dtype=np.float32)


def _max_probability(logits: Array, top: float) -> float:
    return 1.0 / float(np.add.reduce(np.exp(logits - top)))


def _margin(logits: Array, top: float) -> float:
    second, first = np.partition(_probabilities(logits, top), -2)[-2:]
    return float(first - second)


def _entropy(logits: Array, top: float) -> float:
    p = _probabilities(logits, top).astype(np.float64)
    p = p[p > 0]
    return float(np.clip(1.0 + (p * np.log(p)).sum() / math.log(len(logits)), 0.0, 1.0))


SCORES: dict[str, Callable[[Array, Any], float]] = {
    "max_probability": _max_probability,
    "margin": _margin,
    "entropy": _entropy,
}
"""As `offramp.engine.confidence` has them, of logits [S] and the largest of them."""


class ArrayReader:
    """Asks exits and LM head of a chain, which come with their logits.

    A row's sampler says whether it is `plain`: then the largest logit is its token, and nothing
    else of it is asked. Others have `allowed` and `choose`, as `runtimes.edge.sampling` has them.
    """

    follows = False

    def __init__(
        self,
        policy: ExitPolicy,
        gates: Mapping[int, tuple[Array, float]],
        shortlist: Ids | None,
    ) -> None:
        """gates: weights [D] and bias by depth. shortlist: what exits can say; None: everything.

        Raises:
            InputError: a score that needs PyTorch.
        """
        if policy.score not in SCORES:
            raise InputError(
                f"Without PyTorch the score {policy.score!r} is not known.",
                did_you_mean(policy.score, tuple(SCORES)),
            )
        self._score = SCORES[policy.score]
        self._gates = {depth: gates[depth] for depth in policy.gates}
        self._shortlist = shortlist
        self._ids: list[int] | None = None if shortlist is None else shortlist.tolist()

    def computing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def looks(self, asked: Sequence[Question | None]) -> Looks:
        return anyone  # segments run their exits in any case

    def verdicts(
        self, depth: int, output: ChainOutput, asked: Sequence[Question | None]
    ) -> list[Verdict | Exception | None]:
        return [
            None
            if question is None
            else self._verdict(depth, output.entry[place], output.logits[place], question)
            for place, question in enumerate(asked)
        ]

    def _verdict(self, depth: int, entry: Array, logits: Array, question: Question) -> Verdict:
        sampler, rule = question.sampler, question.rule
        if depth in rule.gates:
            weight, bias = self._gates[depth]
            shut = min(-float(entry @ weight) - bias, 700.0)  # `exp` of more is no number
            if not 1.0 / (1.0 + math.exp(shut)) >= rule.gates[depth]:
                return CLOSED
        scored = rule.thresholds.get(depth) != 0.0
        if sampler.plain:
            largest = int(logits.argmax())
            token = largest if self._ids is None else self._ids[largest]
            return Verdict(token, self._score(logits, logits[largest]) if scored else math.nan)
        allowed = sampler.allowed(logits, self._shortlist, question.before)
        verdict = Verdict(-1, self._score(allowed, allowed.max()) if scored else math.nan)
        if rule.exits(depth, verdict) or rule.guesses_at(depth, verdict):
            token = sampler.choose(allowed, self._shortlist, question.before)
            verdict = verdict._replace(token=token)
        return verdict

    def words(self, final: Array) -> Word:
        return lambda place, question: self._word(final[place], question)

    of_logits = words  # a chain ends with logits

    def _word(self, logits: Array, question: Question) -> int:
        sampler = question.sampler
        if sampler.plain:
            return int(logits.argmax())
        allowed = sampler.allowed(logits, None, question.before)
        return int(sampler.choose(allowed, None, question.before))
