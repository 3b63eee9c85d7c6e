"""A drafter and an engine for offramp: lossless drafts by n-grams that the text had before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from offramp.extend import TextDrafts, register_drafter, register_engine

LONGEST = 3
"""Tokens that are looked for."""


def propose(ids: Sequence[int], most: int) -> Sequence[int]:
    """Return what followed the newest tokens where they came last before; the longest match."""
    for size in range(min(LONGEST, len(ids) - 1), 0, -1):
        newest = ids[-size:]
        for start in range(len(ids) - size - 1, -1, -1):
            if ids[start : start + size] == newest:
                return ids[start + size : start + size + most]
    return ()


def open(model: Any, **_: Any) -> Any:
    """Return the adapter, whose answers are the full model's, drafted by n-grams."""
    return model.with_policy(replace(model.policy, drafts={"ngram": 0.0}, lossless=True))


register_drafter("ngram", lambda executor, depth: TextDrafts(executor, depth, propose))
register_engine("ngram", open, "lossless drafts by n-grams of prompt and answer")
