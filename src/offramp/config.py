"""What a training run is asked for. The command line's flags and their help come from here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from offramp.errors import InputError

REGIMES = ("supervised", "unsupervised", "pseudo", "mixed")
CACHES = ("auto", "memory", "disk", "stream")


def _option(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class TrainConfig:
    """One FREE training run. `None` is "off" or "choose for me"."""

    depths: tuple[int, ...] | None = _option(
        None, "depths of the exits, e.g. 3,6; proposed from the layer count when left out"
    )
    regime: str = _option(
        "unsupervised",
        "supervised: answers from the data; unsupervised: the frozen model writes them and its "
        "final layer teaches; pseudo: as labels, those it is sure of; mixed: a fraction labelled",
        choices=REGIMES,
    )
    steps: int = _option(600, "generator steps")
    batch_size: int = _option(16, "examples in a step")
    learning_rate: float = _option(1e-3, "peak learning rate of the exits (AdamW, cosine)")
    discriminator_learning_rate: float = _option(3e-4, "learning rate of the discriminators")
    distillation: float = _option(1.0, "weight of distillation from the final layer")
    adversarial: float = _option(0.01, "weight of the adversarial term; 0 trains no discriminator")
    cross_entropy: float = _option(1.0, "weight of cross-entropy on labelled answers")
    temperature: float = _option(1.0, "distillation temperature")
    conditional: bool = _option(True, "the discriminator also sees the state that entered the exit")
    labelled_fraction: float = _option(0.1, "mixed: share of the examples whose labels are used")
    min_confidence: float = _option(
        0.7, "pseudo: drop answers whose mean token probability (geometric) is lower"
    )
    max_new_tokens: int = _option(40, "longest answer the model writes itself")
    validation_fraction: float = _option(0.1, "share of the images held out for validation")
    evaluate_every: int = _option(100, "steps between validations and checkpoints")
    patience: int | None = _option(
        5, "validations without a better mean agreement before stopping; none: never"
    )
    cache: str = _option("auto", "where the frozen states are kept between epochs", choices=CACHES)
    seed: int = _option(0, "seed of the split, the order and the initial discriminators")

    def __post_init__(self) -> None:
        wrong = [text for text, bad in self._rules() if bad]
        if wrong:
            raise InputError(
                f"This training run cannot start: {'; '.join(wrong)}.",
                "Correct the options named; `offramp train --help` lists them all.",
            )

    def _rules(self) -> list[tuple[str, bool]]:
        weights = {n: getattr(self, n) for n in ("distillation", "adversarial", "cross_entropy")}
        positive = ("steps", "batch_size", "evaluate_every", "max_new_tokens", "temperature")
        rates = ("learning_rate", "discriminator_learning_rate")
        return [
            (
                f"regime {self.regime!r} is not one of {', '.join(REGIMES)}",
                self.regime not in REGIMES,
            ),
            (f"cache {self.cache!r} is not one of {', '.join(CACHES)}", self.cache not in CACHES),
            *((f"{n} must be above 0", not getattr(self, n) > 0) for n in (*positive, *rates)),
            *((f"{n} must not be negative", not w >= 0) for n, w in weights.items()),
            ("every loss weight is 0", not any(weights.values())),
            (
                "the unsupervised regime needs distillation or the adversarial term",
                self.regime == "unsupervised" and not (self.distillation or self.adversarial),
            ),
            ("labelled_fraction must be in (0, 1)", not 0 < self.labelled_fraction < 1),
            ("min_confidence must be in [0, 1]", not 0 <= self.min_confidence <= 1),
            ("validation_fraction must be in (0, 1)", not 0 < self.validation_fraction < 1),
            (
                "patience must be at least 1, or none",
                self.patience is not None and self.patience < 1,
            ),
        ]
