"""The control of every lossless figure: drafts out of a table of the model's own answers.

Which token came behind up to three others in answers to the images that training saw. It has no
weights and sees no image, so a drafter that is not clearly faster has learnt no more than a task's
phrases.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import StoppingCriteriaList

from offramp.adapter import Adapter
from offramp.engine.decoding.decoder import Decoder
from offramp.engine.decoding.drafting import DraftBudget, ExitDrafts
from offramp.engine.decoding.rule import ExitRule
from offramp.engine.executors.slots.executor import SlotExecutor
from offramp.engine.generate import write_answers
from offramp.engine.heads import ExitHeads
from offramp.engine.policy import FULL, GenerationOutput
from offramp.engine.prompt import PromptReader
from offramp.models.backbone import Backbone
from offramp.runtimes.llama_cpp.drafter import ChainDrafter
from offramp.runtimes.llama_cpp.prompt import Prompt
from offramp.runtimes.llama_cpp.runtime import LlamaCppRuntime

LONGEST, SEEN = 3, 3
"""Tokens of a context, and how often one must have been seen."""
SURE = 0.3
"""Product of a draft's probabilities down to which it goes on."""


@dataclass(frozen=True)
class DraftTable:
    """By context, the token that mostly follows and how often it does."""

    follows: Mapping[tuple[int, ...], tuple[int, float]]

    @classmethod
    def of(cls, answers: Iterable[Sequence[int]]) -> DraftTable:
        """Of token ids of answers."""
        counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for answer in answers:
            for place in range(1, len(answer)):
                for length in range(1, min(LONGEST, place) + 1):
                    counts[tuple(answer[place - length : place])][answer[place]] += 1
        return cls(
            {
                context: (token, count / found.total())
                for context, found in counts.items()
                if found.total() >= SEEN
                for token, count in found.most_common(1)
            }
        )

    def draft(self, answer: Sequence[int], most: int, sure: float = SURE) -> list[int]:
        """Up to `most` tokens behind an answer, while the product of their shares is `sure`;
        nothing was seen behind an end token."""
        written, product = [*answer], 1.0
        while len(written) < len(answer) + most:
            lengths = range(min(LONGEST, len(written)), 0, -1)
            known = (self.follows.get(tuple(written[-length:])) for length in lengths)
            token, share = next((found for found in known if found), (-1, 0.0))
            product *= share
            if product < sure:
                break
            written.append(token)
        return written[len(answer) :]


class TableExecutor(SlotExecutor):
    """Slots whose drafts come out of a table. One sequence."""

    def __init__(self, backbone: Backbone, table: DraftTable) -> None:
        super().__init__(backbone, None, ())
        self._table, self._answer, self._first = table, list[int](), -1

    def draft(
        self,
        handles: Sequence[Any],
        ids: Sequence[Any],
        columns: Sequence[int],
        budgets: Sequence[DraftBudget],
    ) -> list[list[int]]:
        if self._first < 0:
            self._first = columns[0]
        answer = [*self._answer[: columns[0] - self._first], ids[0]]
        return [self._table.draft(answer, budgets[0].max_drafts)]

    def verify(
        self, handles: Sequence[Any], ids: Sequence[Sequence[int]], columns: Sequence[int]
    ) -> Tensor:
        self._answer[columns[0] - self._first :] = ids[0]
        return super().verify(handles, ids, columns)


def table_generate(
    backbone: Backbone,
    table: DraftTable,
    inputs: Mapping[str, Any],
    stop: StoppingCriteriaList | None = None,
    *,
    most: int = 4,
    **options: Any,
) -> GenerationOutput:
    """The full model's answer to a prompt of one row, by the one decoder, drafted by a table."""
    reader, heads = PromptReader(backbone, None, ()), ExitHeads(backbone, None, FULL, ())
    given = {} if stop is None else {"stopping_criteria": stop}
    prepared = reader.prepare(inputs, {**options, **given})
    executor = TableExecutor(backbone, table)
    # No layer stands at the depth of the whole model, so no exit is asked.
    rule = ExitRule({backbone.depth: SURE}, lossless=True, max_drafts=most)
    drafter = ExitDrafts(executor, backbone.depth)
    decoder = Decoder(backbone.depth, executor, heads, drafter=drafter)
    try:
        return write_answers(decoder, reader, prepared, rule)
    finally:
        executor.close()


class TableDrafter(ChainDrafter):
    """The same for one sequence inside llama.cpp."""

    def __init__(self, table: DraftTable, depth: int) -> None:
        """depth: of the whole model, where no exit stands: no states are taken."""
        self.depth, self._table = depth, table
        self._answer, self._fed, self._columns = list[int](), list[int](), 0

    def begin(self, slot: int, prompt: Prompt | None) -> None:
        self._answer, self._fed = [], []
        self._columns = 0 if prompt is None else len(prompt.states)

    def draft(self, slot: int, token: int | None, budget: DraftBudget) -> list[int]:
        if token is None:  # the prompt's last, which no triple begins with
            return []
        drafts = self._table.draft([*self._answer, token], budget.max_drafts)
        self._fed = [token, *drafts]
        return drafts

    def crop(self, slot: int, columns: int) -> None:
        self._answer += self._fed[: columns - self._columns]
        self._columns = columns

    def close(self) -> None:
        """There is nothing to give back."""


class TableRuntime(LlamaCppRuntime):
    """Inside llama.cpp, lossless by a table."""

    def __init__(self, adapter: Adapter, folder: Path, table: DraftTable, **how: Any) -> None:
        super().__init__(adapter, folder, **how)
        self._drafter = TableDrafter(table, adapter.backbone.depth)
