"""What thresholds would do, by score, from one pass of the full model: no answer is generated again
and nothing is promised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from offramp.adapter.adapter import Adapter
from offramp.adapter.answers import Answer, full_model_answers, generate_answers
from offramp.calibration.calibrate import GRID
from offramp.calibration.cost_model import Costs, token_seconds
from offramp.calibration.profiler import measure_costs
from offramp.calibration.replay import PolicyReplay, can_replay
from offramp.calibration.risk_functions import QUALITIES
from offramp.core.decoding.policy import ExitPolicy, resolved
from offramp.core.decoding.scores import SCORES
from offramp.core.errors import InputError
from offramp.features.input_processor import InputProcessor
from offramp.features.teacher_forcing import Answered
from offramp.inputs.example import Example


@dataclass(frozen=True)
class Swept:
    """The effect of one threshold of a score, for all exits and all tokens.

    changed: share of answers that would differ from the full model's. depth: mean number of decoder
    layers of a token. seconds: predicted, of decoding a token on this machine. speed: full depth's
    seconds over these. Depth and seconds are along the full model's answers. cider: mean CIDEr-D
    of the answers, those that change decoded again; None: there is an example without references.
    """

    score: str
    threshold: float
    changed: float
    depth: float
    seconds: float
    speed: float
    cider: float | None = None


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

    Of examples that have answers the CIDEr is told too, where pycocoevalcap is installed.

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
        mask, judged = replayed.replay.mask, _Judged(adapter, encoder, rows, max_new_tokens)
        whole = token_seconds(took, replayed.depths({})[:, 1:], ()).sum()
        for threshold in thresholds:
            shared = dict.fromkeys(adapter.exits.depths, threshold)
            depths = replayed.depths(shared)
            seconds = token_seconds(took, depths[:, 1:], adapter.exits.depths).sum()
            differs = replayed.differs(shared)
            at = replace(policy, thresholds=shared)
            found.append(
                Swept(
                    policy.score,
                    threshold,
                    float(differs.mean()),
                    float(depths[mask].mean()),
                    float(seconds / max(1, np.count_nonzero(depths[:, 1:]))),
                    float(whole / seconds) if seconds else 1.0,
                    judged.cider(at, np.flatnonzero(differs).tolist(), batch_size),
                )
            )
    return found


class _Judged:
    """The full model's answers to examples, and what CIDEr gives with some of them changed."""

    def __init__(
        self, adapter: Adapter, encoder: InputProcessor, rows: Sequence[Answered], longest: int
    ) -> None:
        self._adapter, self._encoder, self._longest = adapter, encoder, longest
        self._examples = [row.example for row in rows]
        self._full: list[Answer] = []
        if find_spec("pycocoevalcap") and all(example.answers for example in self._examples):
            texts = (encoder.texts(torch.tensor([row.ids]))[0] for row in rows)
            self._full = [Answer(row.ids, text) for row, text in zip(rows, texts, strict=True)]

    def cider(self, policy: ExitPolicy, changed: Sequence[int], batch_size: int) -> float | None:
        """Return the mean CIDEr-D where a policy changes these answers; None: not told."""
        if not self._full:
            return None
        answers, again = [*self._full], [self._examples[place] for place in changed]
        how: dict[str, Any] = {"batch_size": batch_size, "max_new_tokens": self._longest}
        made = generate_answers(self._adapter, self._encoder, again, policy, **how)
        for place, answer in zip(changed, made, strict=True):
            answers[place] = answer
        return float(np.mean(QUALITIES["cider"](answers, self._examples)))
