"""An example to evaluate, with what its task's official metric needs besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from offramp.core.storage import digest_rows
from offramp.inputs.example import Example
from offramp.inputs.image import content_digest


@dataclass(frozen=True)
class Item:
    """An example to evaluate, with what its task's official metric needs besides.

    references: what the answer is compared with; the example's answers when left out.
    groups: names to report by, such as {"answer_type": "yes/no"} or {"domain": "near-domain"}.
    candidates, gold, relevance: of a dialogue's round: the answers to rank, the right one's place
        (from 0), and how right each is (VisDial's dense annotations; empty if there are none).
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
        """SHA-256 over what the model is asked: prompt, image and candidates."""
        picture = content_digest(self.example.image)
        return digest_rows([[self.example.prompt, picture, list(self.candidates)]])
