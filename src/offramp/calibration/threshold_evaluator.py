"""Thresholds tried on examples: what the answers lose, and what a token costs, at any of them.

The full model's answers are replayed once; only those that thresholds change are generated again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from offramp.adapter import Adapter
from offramp.answers import Answer, free_running
from offramp.calibration.cost_model import Costs, token_seconds
from offramp.calibration.replay import Replay, replay
from offramp.calibration.risk_functions import Risk
from offramp.calibration.threshold_search import Array, Thresholds
from offramp.data.example import Example
from offramp.engine.confidence import SCORES
from offramp.engine.policy import FULL, ExitPolicy
from offramp.engine.teacher_forcing import Answered
from offramp.errors import DataError
from offramp.models.input_processor import InputProcessor


@dataclass(frozen=True)
class ThresholdEvaluator:
    """Examples with the full model's answers, to try thresholds on.

    replay: what the exits say along these answers; None where a replay cannot tell that.
    doubtful: answers [n] of which a replay cannot be sure that they stay unchanged.
    """

    adapter: Adapter
    encoder: InputProcessor
    examples: Sequence[Example]
    policy: ExitPolicy
    risk: Risk
    full: Sequence[Answer]
    replay: Replay | None
    doubtful: Array
    batch_size: int
    options: Mapping[str, Any]
    costs: Costs | None = None

    @classmethod
    def of(
        cls,
        adapter: Adapter,
        encoder: InputProcessor,
        examples: Sequence[Example],
        policy: ExitPolicy,
        risk: Risk,
        batch_size: int,
        options: Mapping[str, Any],
        costs: Costs | None = None,
    ) -> ThresholdEvaluator:
        """Answer the examples with the full model and replay that."""
        full = free_running(adapter, encoder, examples, FULL, batch_size, options)
        found, doubtful = None, np.ones(len(examples), dtype=bool)
        if _replayable(policy, options):
            rows = [Answered(e, a.ids, False) for e, a in zip(examples, full, strict=True)]
            found = replay(
                encoder, adapter.exits, rows, policy.score,
                shortlist=policy.shortlist, batch_size=batch_size,
            )  # fmt: skip
            check_scores([scores[found.mask] for scores in found.scores.values()])
            # In half precision a step of decoding rounds otherwise than a pass over all of them.
            if adapter.backbone.dtype == torch.float32:
                doubtful = found.differs(found.depths({}))
        return cls(
            adapter, encoder, examples, policy, risk, full, found, doubtful, batch_size, options,
            costs,
        )  # fmt: skip

    def part(self, rows: Array) -> ThresholdEvaluator:
        """Only these examples."""
        return replace(
            self,
            examples=[self.examples[i] for i in rows.tolist()],
            full=[self.full[i] for i in rows.tolist()],
            replay=None if self.replay is None else self.replay.part(rows),
            doubtful=self.doubtful[rows],
        )

    @property
    def first(self) -> bool:
        """Whether an answer's first token may leave early."""
        backbone = self.adapter.backbone
        may = self.policy.exit_in_prefill and backbone.family.causal_prompt
        return bool(backbone.is_encoder_decoder or may)

    def losses(self, thresholds: Thresholds) -> Array:
        """What each answer loses [n]; those that stay the full model's lose nothing."""
        policy = replace(self.policy, thresholds=thresholds)
        differs = self.doubtful
        if self.replay is not None:
            ran = self.ran(thresholds)
            differs = differs | self.replay.differs(ran)
        changed = np.flatnonzero(differs).tolist()
        losses = np.zeros(len(self.examples))
        if changed:
            some = [self.examples[i] for i in changed]
            early = free_running(
                self.adapter, self.encoder, some, policy, self.batch_size, self.options
            )
            if self.replay is None and all(thresholds.values()):  # at 0 nothing is scored
                check_scores([np.array([s for a in early for s in a.scores])])
            losses[changed] = self.risk.losses(early, [self.full[i] for i in changed], some)
        return losses

    def ran(self, thresholds: Thresholds) -> Array:
        """The depth [n, A] at which each token of the full model's answers leaves."""
        assert self.replay is not None
        return self.replay.depths(thresholds, gates=self.policy.gates, first=self.first)

    def seconds(self, thresholds: Thresholds) -> float | None:
        """Predicted seconds of a decoded token."""
        if self.replay is None:
            return None
        return self.time(self.ran(thresholds), tuple(thresholds))

    def time(self, depths: Array, exits: Sequence[int]) -> float:
        """Predicted seconds of a token of answers whose depths [n, A] are known."""
        assert self.costs is not None and self.replay is not None
        decoded = depths[:, 1:]  # the prompt's pass gives the first
        shut = {d: some[:, 1:] for d, some in self.replay.shut(self.policy.gates).items()}
        took = token_seconds(self.costs, decoded, exits, shut=shut)
        return float(took.sum() / max(1, (decoded > 0).sum()))


def _replayable(policy: ExitPolicy, options: Mapping[str, Any]) -> bool:
    """Whether what is generated is the arg-max of what a replay reads."""
    plain = set(options) <= {"max_new_tokens", "do_sample"} and not options["do_sample"]
    return policy.kv == "recompute" and policy.score in SCORES and plain


def check_scores(scores: Sequence[Array]) -> None:
    """Raise `DataError` where the scores of all exits are constant, or one is NaN everywhere."""
    known = [some[~np.isnan(some)] for some in scores]
    if not all(map(len, known)):
        raise DataError(
            "The scores of an exit are NaN.",
            "Look for NaN in the exits and the model, e.g. from half precision.",
        )
    if all(np.ptp(some) == 0 for some in known):
        raise DataError(
            f"All scores are the same ({known[0][0]:.4g}), so no threshold tells tokens apart.",
            "Use another --score, or train the exits longer.",
        )
