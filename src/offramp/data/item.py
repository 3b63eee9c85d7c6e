"""An example to evaluate, with what its task's official metric needs besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from offramp.core.storage import digest_rows
from offramp.inputs.example import Example
from offramp.inputs.image import content_digest


@dataclass(frozen=True)
class Item:
    """An example to evaluate, with the further values that its task's official metric needs.

    references: the right answers for comparison; by default the example's answers.
    groups: names to report by, such as {"answer_type": "yes/no"} or {"domain": "near-domain"}.
    candidates: answers to rank, for a round of a dialogue. gold: place of the right one, from 0.
    relevance: how right each one is (VisDial's dense annotations; empty without these).
    """

    example: Example
    references: tuple[str, ...] = ()
    groups: Mapping[str, str] = field(default_factory=dict)
    candidates: tuple[str, ...] = ()
    gold: int | None = None
    relevance: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.references:
            object.__setattr__(self, "references", self.example.answers)

    @property
    def key(self) -> str:
        return self.example.key

    def digest(self) -> str:
        """SHA-256 of the question to the model: prompt, image and candidates."""
        picture = content_digest(self.example.image)
        return digest_rows([[self.example.prompt, picture, list(self.candidates)]])
