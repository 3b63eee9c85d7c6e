"""Trust tried on examples: what answers lose at any level, from one run that takes nothing.

In that run the full model verifies every draft. Each draft that ended an answer leaves its product,
and the answer that it makes; a level of trust takes the first with as much. So the answers that a
level changes are among those that every lower level changes, and none is generated again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from offramp.adapter.adapter import Adapter
from offramp.adapter.answers import Answer, generate_answers
from offramp.adapter.runtime import Runtime
from offramp.calibration.risk_functions import Risk
from offramp.calibration.threshold_evaluator import ThresholdEvaluator
from offramp.calibration.threshold_search import Array
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.errors import InputError
from offramp.features.input_processor import InputProcessor
from offramp.inputs.example import Example
from offramp.promises.conditions import samples

LEVELS = (*(n / 100 for n in range(98, 50, -4)), *(n / 100 for n in range(50, 0, -2)), 0.01, 0.0)
"""That are tested, from 1 down."""
NOTHING = 2.0
"""A trust that takes nothing, and notes what others would."""
LONGEST = 32
"""Drafts of a round, at most: rows that one call verifies."""


def trusting(policy: ExitPolicy, adapter: Adapter, longest: int) -> ExitPolicy:
    """Return the policy whose trust is searched: a round drafts an answer of up to `longest` tokens
    to its end, or as far as one call verifies. First tokens are drafted like all others, unless
    prompts run to full depth."""
    exits = adapter.exits
    drafts = policy.drafts or {exits.depths[-1 if exits.draft_on else 0]: 0.0}
    most = max(policy.max_draft, min(longest, LONGEST))
    return replace(
        policy,
        thresholds={},
        lossless=False,
        drafts=drafts,
        max_draft=most,
        first=None if policy.exit_in_prefill else {},
        trust=NOTHING,
    )


@dataclass(frozen=True)
class TrustPath(ThresholdEvaluator):
    """Examples with the full model's answers and the drafts that were offered in their place.

    A point of the path is a level of trust, by the depth of the drafting exit. texts: of answers,
    by their ids.
    """

    texts: Callable[[Sequence[int]], str] = lambda ids: ""

    @classmethod
    def of(
        cls,
        adapter: Adapter,
        encoder: InputProcessor,
        examples: Sequence[Example],
        policy: ExitPolicy,
        risk: Risk,
        *,
        costs: Any = None,
        batch_size: int = 64,
        runtime: Runtime | None = None,
        known: list[Answer] | None = None,
        progress: Any = iter,
        **options: Any,
    ) -> TrustPath:
        """Answer the examples by a policy of `trusting`; arguments as of its base. known: a list
        that the answers are put into, where they are the full model's to the last token.

        Raises:
            InputError: sampled tokens, which are all verified; a drafter without probabilities.
        """
        if samples(adapter.backbone, options) or policy.drafter is not None:
            raise InputError(
                "Only greedy drafts whose probabilities are known can be taken unverified.",
                "Calibrate greedy answers of exits that draft, or a policy without trust.",
            )
        model, rows = (adapter, batch_size) if runtime is None else (runtime, runtime.rows)

        answer: Callable[..., list[Answer]] = partial(
            generate_answers, model, encoder, batch_size=rows, **options
        )
        full = answer(examples, policy, progress=progress)
        if known is not None and (runtime is not None or adapter.backbone.dtype == torch.float32):
            known[:] = full
        return cls(
            depths=(max(policy.drafts) if adapter.exits.draft_on else min(policy.drafts),),
            policy=policy,
            risk=risk,
            examples=examples,
            full=full,
            answer=answer,
            replay=None,
            doubtful=np.zeros(len(examples), dtype=bool),
            texts=lambda ids: encoder.texts(torch.tensor([[*ids]]))[0],
        )

    def losses(self, thresholds: Mapping[int, float]) -> Array:
        return self._lost([self._taken(one, min(thresholds.values())) for one in self.full])

    def _taken(self, answer: Answer, level: float) -> Answer:
        """What is given at a level in place of an answer that was verified to its end."""
        offered = (ids for product, ids in answer.offers if product >= level)
        ids = next(offered, answer.ids)
        return answer if ids == answer.ids else Answer(ids, self.texts(ids))

    def at(self, point: Mapping[int, float] | None) -> ExitPolicy:
        return replace(self.policy, trust=None) if point is None else self.policy.moved(point)
