"""What exits and the full model of a chain say next, in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.core.decoding.policy import ExitPolicy
from offramp.core.decoding.reader import Query, Word
from offramp.core.decoding.rule import ExitVerdict
from offramp.core.errors import InputError, did_you_mean
from offramp_llama_cpp.executor import ChainOutput
from offramp_llama_cpp.graphs import Array

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
"""As `offramp.core.decoding.confidence` has them, of logits [S] and the largest of them."""


class ArrayHeads:
    """Asks exits and the LM head of a chain, which come with their logits.

    A row's sampler says whether it is `plain`: then the largest logit is its token, and nothing
    else of it is asked. Others have `allowed` and `choose`, as `runtimes.edge.sampling` has them.
    """

    def __init__(self, policy: ExitPolicy, shortlist: Ids | None) -> None:
        """shortlist: what exits can say; None: everything.

        Raises:
            InputError: a score that needs PyTorch.
        """
        if policy.score not in SCORES:
            raise InputError(
                f"Without PyTorch the score {policy.score!r} is not known.",
                did_you_mean(policy.score, tuple(SCORES)),
            )
        self._score = SCORES[policy.score]
        self._shortlist = shortlist
        self._ids: list[int] | None = None if shortlist is None else shortlist.tolist()

    def computing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def verdicts(
        self, depth: int, output: ChainOutput, queries: Sequence[Query | None]
    ) -> list[ExitVerdict | Exception | None]:
        return [
            None if query is None else self._verdict(depth, output.logits[place], query)
            for place, query in enumerate(queries)
        ]

    def _verdict(self, depth: int, logits: Array, query: Query) -> ExitVerdict:
        sampler, rule = query.sampler, query.rule
        scored = rule.scored(depth)
        if sampler.plain:
            largest = int(logits.argmax())
            token = largest if self._ids is None else self._ids[largest]
            return ExitVerdict(token, self._score(logits, logits[largest]) if scored else math.nan)
        allowed = sampler.allowed(logits, self._shortlist, query.before)
        verdict = ExitVerdict(-1, self._score(allowed, allowed.max()) if scored else math.nan)
        if rule.exits(depth, verdict):
            token = sampler.choose(allowed, self._shortlist, query.before)
            verdict = verdict._replace(token=token)
        return verdict

    def words(self, final: Array) -> Word:
        return lambda place, query: self._word(final[place], query)

    of_logits = words  # a chain ends with logits

    def _word(self, logits: Array, query: Query) -> int:
        sampler = query.sampler
        if sampler.plain:
            return int(logits.argmax())
        allowed = sampler.allowed(logits, None, query.before)
        return int(sampler.choose(allowed, None, query.before))
