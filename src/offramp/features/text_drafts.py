"""Drafts by the text alone, for drafters that packages register."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from operator import index
from typing import Any

from offramp.core.decoding.drafting import Draft, DraftBudget, Drafts, places_of, side_by_side
from offramp.core.decoding.executor import Executor
from offramp.core.decoding.sequence import NAN, Sequence

Proposes = Callable[[Many[int], int], Many[int]]
"""Returns ids, at most so many, that may follow the tokens of a prompt and its answer so far."""


class TextDrafts:
    """Drafts from the text alone, such as n-grams that came before. Drafts that the full model
    confirms count at full depth."""

    keeps: int | None = None

    def __init__(self, executor: Executor, depth: int, propose: Proposes) -> None:
        """depth: L of the full model. propose: an error that it raises fails its request alone."""
        self.depth: int = depth
        self._executor, self._propose = executor, propose

    def draft(self, rows: Many[Sequence], budgets: Many[DraftBudget]) -> list[Draft]:
        return [*map(self._draft, rows, budgets)]

    def _draft(self, row: Sequence, budget: DraftBudget) -> Draft:
        drafts = Drafts(budget)
        if budget.max_drafts:
            try:
                for token in self._propose([*row.sampler.prompt, *row.ids], budget.max_drafts):
                    if not drafts.add(index(token), 1.0):
                        break
            except Exception as error:
                row.error = error
        drafts.product = NAN  # nobody said how likely they are
        return side_by_side(row, drafts)

    def verify(self, rows: Many[Sequence], drafts: Many[Draft]) -> Any:
        return self._executor.verify(*places_of(rows, [draft.fed for draft in drafts]))
