"""What lossless decoding gains, and how often its drafts are right, as it is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
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
    """How often drafts were right, in all rounds of some answers.

    acceptance: by place in a round, of those before which all were right. first: of an answer's
    first draft; None: there was none. tokens: written in a round.
    """

    acceptance: tuple[float, ...]
    first: float | None
    tokens: float

    @classmethod
    def of(cls, answers: Sequence[Rounds]) -> Drafted | None:
        """None where no round was made."""
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


@dataclass(frozen=True)
class Worth:
    """speedup: of decoding losslessly, over full depth by the same runtime. drafted: None where
    no answer had two tokens. same: answers that were full depth's."""

    speedup: float
    drafted: Drafted | None
    same: int


def lossless_worth(
    runtime: Runtime,
    policy: ExitPolicy,
    inputs: Sequence[Mapping[str, Any]],
    *,
    rounds: int = 1,
    progress: Any = iter,
    clock: Callable[[], float] = time.process_time,
    **options: Any,
) -> Worth:
    """Answer every input both ways, in turn, by a policy's drafts and at full depth.

    inputs: processor output, batch 1 each, at least one. options: of generation.
    """
    made: list[Rounds] = []

    ways = {
        "full": generate_fn(runtime.generate, policy=policy.in_mode("full"), **options),
        "lossless": generate_fn(
            runtime.generate, lambda output: made.append(output.rounds),
            policy=policy.in_mode("lossless"), **options,
        ),
    }  # fmt: skip
    timings = time_interleaved(ways, inputs, rounds=rounds, progress=progress, clock=clock)
    full, lossless = timings["full"], timings["lossless"]
    same = sum(a == b for a, b in zip(full.answers, lossless.answers, strict=True))
    gained = speedup(full.decode, lossless.decode) if min(lossless.decode) > 0 else 1.0
    return Worth(gained, Drafted.of(made), same)
