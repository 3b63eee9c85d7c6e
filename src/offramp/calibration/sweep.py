"""What thresholds would do, by score, from one pass of the full model: no answer is generated again
and nothing is promised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offramp.adapter.adapter import Adapter
from offramp.adapter.answers import full_model_answers
from offramp.calibration.calibrate import GRID
from offramp.calibration.cost_model import Costs, token_seconds
from offramp.calibration.profiler import measure_costs
from offramp.calibration.replay import PolicyReplay, can_replay
from offramp.core.decoding.policy import ExitPolicy, resolved
from offramp.core.decoding.scores import SCORES
from offramp.core.errors import InputError
from offramp.features.input_processor import InputProcessor
from offramp.inputs.example import Example


@dataclass(frozen=True)
class Swept:
    """The effect of one threshold of a score, for all exits and all tokens.

    changed: share of answers that would differ from the full model's. depth: mean number of decoder
    layers of a token. seconds: predicted, of decoding a token on this machine. speed: full depth's
    seconds over these. Depth and seconds are along the full model's answers.
    """

    score: str
    threshold: float
    changed: float
    depth: float
    seconds: float
    speed: float


def sweep(
    adapter: Adapter,
    encoder: InputProcessor,
    examples: Sequence[Example],
    scores: Sequence[str] = (),
    *,
    thresholds: Sequence[float] = GRID,
    costs: Costs | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 40,
    progress: Any = iter,
) -> list[Swept]:
    """Return the effect of each threshold of each score, the safest first.

    scores: keys of `SCORES`; none: the adapter's. costs: of decoding; None: measured here.

    Raises:
        InputError: a score that a replay cannot show.
    """
    own = adapter.policy
    policies = [
        resolved(ExitPolicy(score=score, shortlist=own.shortlist), adapter.backbone)
        for score in scores or (own.score,)
    ]
    if wrong := [policy.score for policy in policies if not can_replay(policy)]:
        raise InputError(
            f"A pass of the full model does not show what {wrong[0]!r} scores.",
            f"Use {', '.join(SCORES)}.",
        )
    rows = full_model_answers(
        encoder, examples, batch_size=batch_size, max_new_tokens=max_new_tokens, progress=progress
    )
    found = []
    for policy in policies:
        replayed = PolicyReplay.of(encoder, adapter.exits, rows, policy, batch_size=batch_size)
        took = costs or measure_costs(
            adapter.backbone,
            encoder.prompts(examples[:1]),
            adapter.exits,
            score=policy.score,
            shortlist=policy.shortlist,
        )
        mask = replayed.replay.mask
        whole = token_seconds(took, replayed.depths({})[:, 1:], ()).sum()
        for threshold in thresholds:
            shared = dict.fromkeys(adapter.exits.depths, threshold)
            depths = replayed.depths(shared)
            seconds = token_seconds(took, depths[:, 1:], adapter.exits.depths).sum()
            found.append(
                Swept(
                    policy.score,
                    threshold,
                    float(replayed.differs(shared).mean()),
                    float(depths[mask].mean()),
                    float(seconds / max(1, np.count_nonzero(depths[:, 1:]))),
                    float(whole / seconds) if seconds else 1.0,
                )
            )
    return found
