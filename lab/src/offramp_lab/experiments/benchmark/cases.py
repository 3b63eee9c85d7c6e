"""What can be forced: exits that follow a plan, at a rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from offramp.errors import InputError, check_known

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
        right.
    """

    depth: int
    rate: float
    policy: str = "recompute"

    def __post_init__(self) -> None:
        check_known("Policy", [self.policy], tuple(POLICIES))
        if not 0.0 <= self.rate <= 1.0:
            raise InputError(
                f"A rate of {self.rate} is not a share of tokens.", "Give numbers from 0 to 1."
            )
