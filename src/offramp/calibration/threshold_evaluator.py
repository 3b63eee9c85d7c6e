"""Thresholds tried on examples: what the answers lose, and what a token costs, at any of them.

The full model's answers are replayed once; only those that thresholds change are generated again.
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
from offramp.calibration.attempts import ImageRows, cluster_of
from offramp.calibration.cost_model import Costs, token_seconds
from offramp.calibration.replay import PolicyReplay, can_replay
from offramp.calibration.risk_functions import Risk
from offramp.calibration.threshold_search import Array, candidates, pareto_path
from offramp.core.decoding.policy import FULL, ExitPolicy, Thresholds
from offramp.core.errors import DataError
from offramp.features.input_processor import InputProcessor
from offramp.features.teacher_forcing import Answered
from offramp.inputs.example import Example
from offramp.promises.conditions import samples

SEARCH = 0.3
"""Share of the images on which several exits' path, and a threshold of first tokens, are found."""
LOST_SHARE = 0.5
"""Share of what may be lost that is spent, on the answers searched on, on first tokens that exit,
where no other token exits."""


@dataclass(frozen=True)
class ThresholdEvaluator:
    """Examples with the full model's answers, on which thresholds are tried.

    depths: of the exits. policy: whose thresholds are tried. risk: of the losses. full: the full
    model's answers. answer: generates answers to examples by a policy. replay: the exits'
    predictions along the full answers; None: a replay cannot show them. doubtful: answers [n] that
    may change although the replay does not show it. costs: of decoding; None: no times are
    predicted. by_own_tower: the full model's answers with a vision tower that does not round; None:
    `full` are such.
    """

    depths: tuple[int, ...]
    policy: ExitPolicy
    risk: Risk
    examples: Sequence[Example]
    full: Sequence[Answer]
    answer: Callable[[Sequence[Example], ExitPolicy], list[Answer]]
    replay: PolicyReplay | None
    doubtful: Array
    costs: Costs | None = None
    by_own_tower: Sequence[Answer] | None = None

    @classmethod
    def of(
        cls,
        adapter: Adapter,
        encoder: InputProcessor,
        examples: Sequence[Example],
        policy: ExitPolicy,
        risk: Risk,
        *,
        costs: Costs | None = None,
        batch_size: int = 64,
        runtime: Runtime | None = None,
        known: list[Answer] | None = None,
        progress: Any = iter,
        **options: Any,
    ) -> ThresholdEvaluator:
        """Answer the examples with the full model and replay the answers.

        runtime: answers in the adapter's place. Its answers are generated and not replayed, because
        a replay runs the adapter's own exits. known: the full model's answers; where the list is
        empty, they are put into it. progress: wraps the batches of these. options: of generation.
        """
        model, rows = (adapter, batch_size) if runtime is None else (runtime, runtime.rows)
        answer: Callable[..., list[Answer]] = partial(
            generate_answers, model, encoder, batch_size=rows, **options
        )
        known = [] if known is None else known
        if not known:
            known += answer(examples, FULL, progress=progress)
        full, replayed = known, None
        doubtful = np.ones(len(examples), dtype=bool)
        if runtime is None and can_replay(policy) and _is_greedy(adapter, options):
            said = [Answered(e, a.ids, False) for e, a in zip(examples, full, strict=True)]
            replayed = PolicyReplay.of(encoder, adapter.exits, said, policy, batch_size=batch_size)
            tokens = replayed.replay
            check_scores([scores[tokens.mask] for scores in tokens.scores.values()])
            # In half precision a step of decoding rounds otherwise than a pass over all of them.
            if adapter.backbone.dtype == torch.float32:
                doubtful = replayed.differs({})
        return cls(
            depths=adapter.exits.depths,
            policy=policy,
            risk=risk,
            examples=examples,
            full=full,
            answer=answer,
            replay=replayed,
            doubtful=doubtful,
            costs=costs,
        )

    @property
    def held_to(self) -> Sequence[Answer]:
        """Return the answers that losses are against."""
        return self.full if self.by_own_tower is None else self.by_own_tower

    def part(self, rows: Array) -> ThresholdEvaluator:
        """Return the evaluator of these examples alone."""
        own = self.by_own_tower
        return replace(
            self,
            examples=[self.examples[i] for i in rows.tolist()],
            full=[self.full[i] for i in rows.tolist()],
            by_own_tower=None if own is None else [own[i] for i in rows.tolist()],
            replay=None if self.replay is None else self.replay.part(rows),
            doubtful=self.doubtful[rows],
        )

    def with_first(self, threshold: float) -> ThresholdEvaluator:
        """Return the evaluator with a separate threshold for first tokens."""
        policy = replace(self.policy, first=Thresholds.shared(self.depths, threshold))
        replayed = None if self.replay is None else replace(self.replay, policy=policy)
        return replace(self, policy=policy, replay=replayed)

    def losses(self, thresholds: Mapping[int, float]) -> Array:
        """Return the loss of each answer [n]; those equal to the answers held to lose nothing."""
        policy = replace(self.policy, thresholds=Thresholds(thresholds))
        differs = self.doubtful
        if self.replay is not None:
            differs = differs | self.replay.differs(thresholds)
        changed = np.flatnonzero(differs).tolist()
        given = dict(enumerate(self.full))
        if changed:
            early = self.answer([self.examples[i] for i in changed], policy)
            if self.replay is None and all(thresholds.values()):  # at 0 nothing is scored
                check_scores([np.array([s for a in early for s in a.scores])])
            given |= dict(zip(changed, early, strict=True))
        return self._lost([*given.values()])

    def _lost(self, given: Sequence[Answer]) -> Array:
        """What answers [n] lose."""
        losses = np.zeros(len(given))
        pairs = zip(given, self.held_to, strict=True)
        if other := [i for i, (one, best) in enumerate(pairs) if one.ids != best.ids]:
            answers, right = [given[i] for i in other], [self.held_to[i] for i in other]
            losses[other] = self.risk.losses(answers, right, [self.examples[i] for i in other])
        return losses

    def at(self, point: Mapping[int, float] | None) -> ExitPolicy:
        """Return the policy at a point of the path; point: None: without thresholds."""
        if point is None:
            first = self.policy.first
            return replace(self.policy, thresholds={}, first=None if first else first)
        return self.policy.moved(point)

    def seconds(self, thresholds: Mapping[int, float]) -> float | None:
        """Return the predicted seconds of a decoded token; None without costs or a replay."""
        if self.replay is None or self.costs is None:
            return None
        return self.time(self.replay.depths(thresholds), tuple(thresholds))

    def time(self, depths: Array, exits: Sequence[int]) -> float:
        """Return the predicted seconds of a token, for answers whose depths [n, A] are known."""
        assert self.costs is not None and self.replay is not None
        decoded = depths[:, 1:]  # the prompt's pass gives the first
        took = token_seconds(self.costs, decoded, exits)
        return float(took.sum() / max(1, (decoded > 0).sum()))


# -- the path ----------------------------------------------------------------------------------


def split_images(
    whole: ThresholdEvaluator, images: Sequence[ImageRows], *, also: bool = False
) -> tuple[list[ImageRows], list[ImageRows]]:
    """Return the images on which a path is searched, and those on which it is tested. The split is
    by rank, so that added images never move searched ones into the test; copies of searched images
    are searched too. also: whether more than a path is searched.

    Raises:
        DataError: too few images for both.
    """
    if not (also or searches(whole)):
        return [], list(images)
    searched_on = {cluster_of(image) for image in images if image.rank < SEARCH}
    search = [image for image in images if cluster_of(image) in searched_on]
    tested = [image for image in images if cluster_of(image) not in searched_on]
    if not search or not tested:
        raise DataError(
            f"{len(images)} images are too few to search thresholds on some and test on others.",
            "Give more images, or calibrate one exit, with no threshold searched for first tokens.",
        )
    return search, tested


def searches(whole: ThresholdEvaluator) -> bool:
    """Return True if each exit may have a threshold of its own."""
    return len(whole.depths) > 1 and whole.replay is not None and whole.costs is not None


def lowest(
    whole: ThresholdEvaluator, search: Sequence[ImageRows], values: Sequence[float], spare: float
) -> float:
    """Return the lowest threshold of first tokens at which searched answers, with no other token
    exiting, lose at most `LOST_SHARE` of `spare`, one standard error included; 1 where there is
    none."""
    part = whole.part(np.array(sorted(row for image in search for row in image.rows)))
    never = Thresholds.shared(part.depths, 1.0)
    found = 1.0
    for value in sorted(set(values) - {1}, reverse=True):
        losses = part.with_first(value).losses(never)
        if losses.mean() + losses.std() / len(losses) ** 0.5 > LOST_SHARE * spare:
            break
        found = float(value)
    return found


def path_of(
    whole: ThresholdEvaluator, search: Sequence[ImageRows], grid: Sequence[float]
) -> list[Thresholds]:
    """Return the thresholds to test, the safest first; without a search, one threshold for all
    exits."""
    if not searches(whole):
        return [Thresholds.shared(whole.depths, t) for t in sorted(grid, reverse=True)]
    part = whole.part(np.array(sorted(row for image in search for row in image.rows)))
    assert part.replay is not None
    return pareto_path(part.replay, candidates(whole.depths, grid), part.time, grid)


def _is_greedy(adapter: Adapter, options: Mapping[str, Any]) -> bool:
    """Whether what is generated is the arg-max of what a replay reads."""
    plain = set(options) <= {"max_new_tokens", "do_sample"}
    return plain and not samples(adapter.backbone, options)


def check_scores(scores: Sequence[Array]) -> None:
    """Raise `DataError` where the scores of all exits are constant, or one is NaN everywhere."""
    known = [exit_scores[~np.isnan(exit_scores)] for exit_scores in scores]
    if not all(map(len, known)):
        raise DataError(
            "The scores of an exit are NaN.",
            "Look for NaN in the exits and the model, e.g. from half precision.",
        )
    if all(np.ptp(exit_scores) == 0 for exit_scores in known):
        raise DataError(
            f"All scores are the same ({known[0][0]:.4g}), so no threshold separates tokens.",
            "Use another --score, or train the exits longer.",
        )
