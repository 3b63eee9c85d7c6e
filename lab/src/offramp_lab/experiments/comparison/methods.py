"""What is compared: objectives to train exits by, policies to exit by, and the plan of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import offramp_lab.methods  # noqa: F401  it registers the baselines that are compared
from offramp.common.options import option
from offramp.core.decoding.confidence import FEATURE_SCORES, HEADS
from offramp.core.decoding.scores import SCORES
from offramp.core.errors import InputError, check_known
from offramp.training.config import FREE as ADDED
from offramp.training.config import OBJECTIVES as TERMS
from offramp.training.config import TrainConfig
from offramp_lab.experiments.comparison.tradeoff import FREE

SUPERVISED = "free_supervised"
"""FREE that reads the labels too: what cross_entropy, which reads them, is compared with."""
FEW = "cross_entropy_few"
"""Cross-entropy where few answers are labelled: what labels alone are worth then."""
OWN = "cross_entropy_own"
"""Cross-entropy alone on the answers that FREE learns from, where the plan lets it learn from those
of the model's own that it is confident of: what those answers are worth without the other terms."""


def _only(term: str, **more: Any) -> dict[str, Any]:
    """One term of the loss with weight 1 and nothing else."""
    return {**dict.fromkeys(TERMS, 0.0), term: 1.0, **more}


OBJECTIVES: dict[str, Mapping[str, Any] | None] = {
    "logit_lens": None,
    "cross_entropy": _only("cross_entropy", regime="supervised"),
    FEW: _only("cross_entropy", regime="mixed"),
    OWN: _only("cross_entropy", regime="pseudo"),
    "deebert": _only("cross_entropy", regime="supervised", exit_kind="off_ramp"),
    "distillation": _only("distillation"),
    FREE: {},
    SUPERVISED: {"regime": "supervised"},
}
"""Changes to the `TrainConfig`; None: nothing is trained. Cross-entropy as in BranchyNet
(Teerapittayanon et al. 2016), on the data's answers or, where there are none, on the model's own;
`FEW` on a `labelled_fraction` of the data's; `OWN` on the model's own either way; by DeeBERT (Xin
et al. 2020) of exits that are classifiers of their own; distillation as in CapEEN (Bajpai and
Hanawal 2024). All but cross-entropy on the data's answers and `SUPERVISED` read no label."""

POLICIES = (*SCORES, *HEADS, *FEATURE_SCORES)
"""Scores that decide."""


@dataclass(frozen=True)
class Plan:
    """What is compared, and how long it is looked at.

    objectives: keys of `OBJECTIVES`, compared by max_probability where they apply: `FEW` and
        `SUPERVISED` where the data has answers, `OWN` where it has pseudo-labels. FREE
        is always among them.
    policies: of `POLICIES`, compared on FREE's exits.
    pairs: more of (objective, policy), at the depths `several`: methods as they were published.
        ("logit_lens", "saturation") is what MuE (Tang et al. 2023) comes to on a frozen model,
        ("cross_entropy", "patience") is PABEE (Zhou et al. 2020), ("deebert", "entropy") DeeBERT.
    depths, several: patience and agreement need more than one exit.
    quantiles: thresholds are these quantiles of the scores, so that the points of a curve spread;
        from 0, where all exit, for a curve must reach the quality at which it is read.
    training: what all objectives share; FREE is that as it is, with an adversary in any case.
    seeds: from `training.seed` on. timed, rounds: may be others later.
    """

    objectives: tuple[str, ...] = tuple(OBJECTIVES)
    policies: tuple[str, ...] = POLICIES
    pairs: tuple[tuple[str, str], ...] = ()
    depths: tuple[int, ...] | None = option(
        None, "of the exits of every objective", shown="a quarter of the layers"
    )
    several: tuple[int, ...] | None = option(
        None,
        "of FREE's exits for policies that need more than one",
        shown="a quarter, a half and three quarters of the layers",
    )
    quantiles: tuple[float, ...] = (0.0, 0.005, 0.02, 0.1, 0.3, 0.6)
    training: TrainConfig = field(
        default_factory=lambda: TrainConfig(exit_kind="layer", patience=None, **ADDED)
    )
    seeds: int = option(1, "train and time all of it this often; figures are means")
    exit_in_prefill: bool = option(
        True, "let first tokens exit early too, where the prompt is causal", shown="they do"
    )
    timed: int = option(12, "test examples that are timed")
    rounds: int = option(5, "rounds of the timing")
    batch_size: int = 64
    max_new_tokens: int = 48

    def __post_init__(self) -> None:
        objectives = (*self.objectives, *(objective for objective, _ in self.pairs))
        check_known("Objective", objectives, tuple(OBJECTIVES))
        check_known("Policy", (*self.policies, *(p for _, p in self.pairs)), POLICIES)
        counts = ("seeds", "timed", "rounds", "batch_size", "max_new_tokens")
        wrong = [f"{n} is {getattr(self, n)}" for n in counts if getattr(self, n) < 1]
        if not self.quantiles or not all(0 <= q <= 1 for q in self.quantiles):
            wrong.append(f"quantiles are {self.quantiles}")
        if self.several is not None and len(self.several) < 2:
            wrong.append(f"several is {self.several}")
        if wrong:
            raise InputError(
                f"This comparison cannot start: {'; '.join(wrong)}.",
                "Give counts of 1 or more, quantiles from 0 to 1, and two or more depths.",
            )

    def changes(self, objective: str) -> Mapping[str, Any] | None:
        """To `training`, by an objective; FREE's exits play against an adversary in any case."""
        changes = OBJECTIVES[objective]
        if objective in (FREE, SUPERVISED) and not self.training.has_discriminator:
            return {**ADDED, **(changes or {})}
        return changes

    def others(self, *, labelled: bool) -> list[str]:
        """Those of `objectives` that differ from FREE in this plan; FREE is not among them.

        labelled: whether all examples have answers.
        """
        alike = {FREE}
        if not labelled:
            alike |= {FEW, SUPERVISED}
        if self.training.regime != "pseudo":
            alike.add(OWN)
        return [o for o in OBJECTIVES if o in self.objectives and o not in alike]


DEFAULT = Plan()
