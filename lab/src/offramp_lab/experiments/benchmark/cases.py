"""What can be forced: exits that follow a plan, at a rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from offramp.errors import InputError, did_you_mean

POLICIES: dict[str, dict[str, Any]] = {
    "recompute": {"kv": "recompute"},
    "propagate": {"kv": "propagate"},
    "lossless": {"lossless": True},
}
"""What can be forced, and what it is to `ExitPolicy`."""

RATES = (0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Case:
    """Tokens that exit at `depth`.

    rate: share of tokens that exit; lossless, where all are drafted: share of drafts that are
        right. max_draft: lossless only; None: what the cost model finds fastest.
    """

    depth: int
    rate: float
    policy: str = "recompute"
    max_draft: int | None = None

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise InputError(
                f"Policy {self.policy!r} is not known.", did_you_mean(self.policy, POLICIES)
            )
        if not 0.0 <= self.rate <= 1.0:
            raise InputError(
                f"A rate of {self.rate} is not a share of tokens.", "Give numbers from 0 to 1."
            )
        if self.max_draft is not None and self.max_draft < 1:
            raise InputError(
                f"A draft of at most {self.max_draft} tokens is no draft.", "Give at least 1."
            )
