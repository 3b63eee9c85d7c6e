"""What a training run is asked for. The command line's flags and their help come from here."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from offramp.common.options import option
from offramp.core.errors import InputError

REGIMES = ("supervised", "unsupervised", "pseudo", "mixed")
CACHES = ("auto", "memory", "disk", "stream")
FREE: dict[str, Any] = {"adversarial": 0.003}
"""What FREE (Bajpai and Hanawal 2025) adds to the default, which is distillation alone: where both
were measured, the adversary gains nothing (docs/decisions.md)."""
OBJECTIVES = ("distillation", "cross_entropy", "l2", "cosine", "adversarial")


def parse_weights(text: str) -> dict[str, float]:
    """Return `"l1=0.5,other=0.1"` as weights by name.

    Raises:
        ArgumentTypeError: it is not of that form.
    """
    try:
        pairs = [part.partition("=") for part in text.split(",") if part]
        return {name: float(weight) for name, _, weight in pairs}
    except ValueError:
        raise ArgumentTypeError(f"{text[:60]!r} is not of the form name=0.5,other=0.1") from None


@dataclass(frozen=True)
class TrainConfig:
    """One training run. `None` is "off" or "choose for me"; `TrainConfig(**FREE)` is FREE's."""

    depths: tuple[int, ...] | None = option(
        None, "depths of the exits, such as 3,6", shown="proposed from the layer count"
    )
    regime: str = option(
        "unsupervised",
        "whose answers exits learn from; supervised: the data's (all captions, of several answers "
        "the most frequent); unsupervised: the frozen model's own, taught by its final layer",
        choices=REGIMES,
    )
    exit_kind: str = option(
        "drafting",
        "what an exit is: drafting: a copied decoder layer that then learns to draft on, for "
        "lossless decoding; layer: without that second stage; dense: with one MLP in place of its "
        "experts; or a kind registered by a plug-in",
    )
    steps: int = option(600, "training steps")
    batch_size: int = option(16, "examples in a step")
    learning_rate: float = option(1e-3, "peak learning rate of the exits (AdamW, cosine)")
    discriminator_learning_rate: float = option(3e-4, "learning rate of the discriminators")
    distillation: float = option(1.0, "weight of distillation from the final layer")
    adversarial: float = option(0.0, "weight of the adversarial term; 0: no discriminator")
    cross_entropy: float = option(1.0, "weight of cross-entropy on labelled answers")
    l2: float = option(0.0, "weight of the squared distance to the final layer's features")
    cosine: float = option(0.0, "weight of 1 - cosine similarity to the final layer's features")
    losses: Mapping[str, float] = field(
        default_factory=dict,
        metadata={
            "help": "weights of losses, as cross_entropy=0.5,other=0.1: distillation, "
            "cross_entropy (of labelled answers), adversarial (FREE's), l2, cosine, and what "
            "plug-ins registered",
            "parse": parse_weights,
            "metavar": "NAME=X,...",
            "shown": "distillation=1,cross_entropy=1; FREE adds adversarial=0.003",
        },
    )
    temperature: float = option(1.0, "distillation temperature")
    labelled_fraction: float = option(0.1, "mixed: share of the examples whose labels are used")
    min_confidence: float = option(
        0.7, "pseudo: drop answers whose mean token probability (geometric) is lower"
    )
    max_new_tokens: int = option(40, "longest answer the model writes itself")
    validation_fraction: float = option(0.1, "share of the images held out for validation")
    evaluate_every: int = option(100, "steps between validations and checkpoints")
    patience: int | None = option(
        5, "validations without a better mean agreement before stopping; none: never"
    )
    shortlist: int | None = option(
        None,
        "tokens that exits read, the most frequent of the answers; 0: the whole vocabulary",
        least=0,
        shown="2048 where the LM head weighs more than two layers and at most 5%% of held-out "
        "tokens are missed; else 0",
    )
    cache: str = option("auto", "where the frozen states are kept between epochs", choices=CACHES)
    seed: int = option(0, "seed of the split, the order and the initial discriminators")

    def __post_init__(self) -> None:
        wrong = [text for text, bad in self._rules() if bad]
        if wrong:
            raise InputError(
                f"This training run cannot start: {'; '.join(wrong)}.",
                "Correct the options named; `offramp train --help-all` lists them.",
            )

    @property
    def has_discriminator(self) -> bool:
        """Return True if a term of the exits' loss needs a discriminator."""
        return self.adversarial > 0

    @property
    def weights(self) -> dict[str, float]:
        """Return the terms of the exits' loss by weight, without those of weight 0."""
        on = {name: getattr(self, name) for name in OBJECTIVES}
        return {n: w for n, w in {**on, **self.losses}.items() if w > 0}

    @property
    def learns_without_labels(self) -> bool:
        """Return True if a term of the exits' loss reads no labels."""
        return bool(self.weights.keys() - {"cross_entropy"})

    def _rules(self) -> list[tuple[str, bool]]:
        choices = {f.name: f.metadata["choices"] for f in fields(self) if "choices" in f.metadata}
        on = self.weights.keys()
        positive = ("steps", "batch_size", "evaluate_every", "max_new_tokens", "temperature")
        rates = ("learning_rate", "discriminator_learning_rate")
        registered = [n for n, w in self.losses.items() if not w >= 0]
        return [
            *(
                (f"{n} {value!r} is not one of {', '.join(allowed)}", value not in allowed)
                for n, allowed in choices.items()
                for value in [getattr(self, n)]
            ),
            *((f"{n} must be above 0", not getattr(self, n) > 0) for n in (*positive, *rates)),
            *((f"{n} must not be negative", not getattr(self, n) >= 0) for n in OBJECTIVES),
            (f"weights of {', '.join(registered)} must not be negative", bool(registered)),
            ("no loss has a weight", not on),
            (
                "the unsupervised regime needs a loss without labels: "
                f"{', '.join(n for n in OBJECTIVES if n != 'cross_entropy')}",
                self.regime == "unsupervised" and on == {"cross_entropy"},
            ),
            ("labelled_fraction must be in (0, 1)", not 0 < self.labelled_fraction < 1),
            ("min_confidence must be in [0, 1]", not 0 <= self.min_confidence <= 1),
            ("validation_fraction must be in (0, 1)", not 0 < self.validation_fraction < 1),
            (
                "patience must be at least 1, or none",
                self.patience is not None and self.patience < 1,
            ),
            (
                "a shortlist must be of at least 2 tokens, or 0 for the whole vocabulary",
                self.shortlist is not None and (self.shortlist < 0 or self.shortlist == 1),
            ),
        ]
