"""What lossless decoding gains, and how often its drafts are right, as it is measured."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offramp.answers import Runtime
from offramp.engine.policy import ExitPolicy
from offramp.evaluation.timing import generate_fn, speedup, time_interleaved

Rounds = Sequence[Sequence[int]]
"""Of one answer: tokens drafted and kept, each time that the full model was asked."""


@dataclass(frozen=True)
class Drafted:
    """The share of drafts that were right, in all rounds of some answers.

    acceptance: by place in a round, of those before which all were right. first: of an answer's
    first draft; None: there was none. tokens: written in a round.
    """

    acceptance: tuple[float, ...]
    first: float | None
    tokens: float

    @classmethod
    def of(cls, answers: Sequence[Rounds]) -> Drafted | None:
        """Return the shares of some rounds; None where no round was made."""
        every = [(one[0], one[1]) for answer in answers for one in answer]
        if not every:
            return None
        most = max(drafted for drafted, _ in every)
        places = [[kept > k for drafted, kept in every if drafted > k <= kept] for k in range(most)]
        firsts = [answer[0][1] > 0 for answer in answers if answer and answer[0][0]]
        return cls(
            tuple(float(np.mean(place)) for place in places if place),
            float(np.mean(firsts)) if firsts else None,
            1 + float(np.mean([kept for _, kept in every])),
        )


def lossless_worth(
    runtime: Runtime,
    policy: ExitPolicy,
    inputs: Sequence[Mapping[str, Any]],
    *,
    progress: Any,
    **options: Any,
) -> tuple[float, Drafted | None]:
    """Answer every input both ways, in turn, by a policy's drafts and at full depth.

    inputs: processor output, batch 1 each, at least one. progress: wraps the rounds, of which there
    are three. options: of generation.

    Returns:
        How many times as fast decoding is, by CPU time, and how often drafts were right: None
        where no answer had two tokens.
    """
    made: list[Rounds] = []
    ways = {
        "full": generate_fn(runtime.generate, policy=policy.in_mode("full"), **options),
        "lossless": generate_fn(
            runtime.generate, lambda output: made.append(output.rounds),
            policy=policy.in_mode("lossless"), **options,
        ),
    }  # fmt: skip
    timings = time_interleaved(
        ways, inputs, rounds=3, progress=progress, clock=time.process_time, drafting={"lossless"}
    )
    full, lossless = timings["full"].decode, timings["lossless"].decode
    return speedup(full, lossless) if min(lossless) > 0 else 1.0, Drafted.of(made)
