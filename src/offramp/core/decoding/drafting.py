"""Drafters: what writes the drafts of a round, and how the full model verifies them.

A round drafts on from the newest token of each sequence, takes drafts that are trusted, verifies
all others in one call of the deep layers, and keeps those that the full model says too (`Decoder`).
Nothing of a round outlives it.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import Any, NamedTuple, Protocol

from offramp.core.decoding.executor import Executor, Handle, Span
from offramp.core.decoding.reader import Heads, Query
from offramp.core.decoding.sequence import NAN, Sequence
from offramp.core.errors import InputError, OfframpError

Ends = Callable[[int], bool]
"""Whether an answer is over with a token."""


class DraftBudget(NamedTuple):
    """The limits of a round's drafts. max_drafts: tokens, at most. min_probability: an exit stops
    drafting once the product of its drafts' probabilities is lower. ends: whether a token ends the
    answer; nothing is drafted after such a token."""

    max_drafts: int
    min_probability: float
    ends: Ends


FeedOn = Callable[[Handle, int, DraftBudget], list[tuple[int, Any]]]
"""Feeds the next token of a sequence as `Executor.feed` does, and then what the first exit says, as
long as each is as likely as the budget wants. Returns of each token fed what the exit says after
it, and its output."""


class Drafts:
    """The drafts of one sequence in one round, within its budget. product: of their
    probabilities."""

    def __init__(self, budget: DraftBudget) -> None:
        self.ids: list[int] = []
        self.product = 1.0
        self._budget = budget

    def add(self, token: int, probability: float) -> bool:
        """Keep the next draft, if probable enough; return True where another draft may follow."""
        budget, product = self._budget, self.product * probability
        if product < budget.min_probability:
            return False
        self.ids.append(token)
        self.product = product
        return len(self.ids) < budget.max_drafts and not budget.ends(token)


class Draft(NamedTuple):
    """A round's draft of one sequence. fed: token ids that the full model reads: the newest token,
    if any, and the drafts. said: token ids that the exit is confident of, one after the prompt (if
    the prompt waits) and one after each of `fed`. product: of the probabilities of `said`; NaN
    where unknown."""

    fed: list[int]
    said: list[int]
    product: float = NAN


class Drafter(Protocol):
    """Writes drafts for an executor's sequences.

    depth: of the exit that drafts; accepted drafts count at this depth. keeps: depth of an exit;
    the reader of prompts must keep this exit's state for the drafter; None: no state is needed.
    """

    depth: int
    keeps: int | None

    def draft(self, rows: Many[Sequence], budgets: Many[DraftBudget]) -> list[Draft]:
        """Write the drafts that follow the newest token of each sequence."""
        ...

    def verify(self, rows: Many[Sequence], drafts: Many[Draft]) -> Any:
        """Run the fed tokens of each sequence through all layers. Returns what `Heads.words` takes:
        outputs of the prompt's last token (if the prompt waits) and of the fed tokens, sequence by
        sequence."""
        ...


class DraftingExecutor(Executor, Protocol):
    """An executor with an exit that drafts several tokens in a row from its own state."""

    def draft(
        self,
        handles: Many[Handle],
        ids: Many[int | None],
        columns: Many[int],
        budgets: Many[DraftBudget],
    ) -> list[Drafts]:
        """Return each sequence's drafts after its next token, by the drafting exit from its state
        of the column before; no draft where that state is unknown. ids: next token ids; None: after
        a prompt that waits."""
        ...


class ExitDrafts:
    """Drafts by an exit that drafts on from its own state, without a layer of the backbone."""

    def __init__(self, executor: DraftingExecutor, depth: int) -> None:
        self.depth: int = depth
        self._executor = executor
        self.keeps: int | None = depth

    def draft(self, rows: Many[Sequence], budgets: Many[DraftBudget]) -> list[Draft]:
        newest = [row.ids[-1] if row.ids else None for row in rows]
        return [*map(side_by_side, rows, self._executor.draft(*places_of(rows, newest), budgets))]

    def verify(self, rows: Many[Sequence], drafts: Many[Draft]) -> Any:
        return self._executor.verify(*places_of(rows, [draft.fed for draft in drafts]))


class PlainDrafts:
    """Drafts by an exit's ordinary predictions: each draft is fed to the layers below the exit. The
    layers above verify all drafts in one call."""

    keeps: int | None = None

    def __init__(self, executor: Executor, heads: Heads, depth: int) -> None:
        """depth: of the exit, one of the executor's."""
        self.depth: int = depth
        self._executor, self._heads = executor, heads
        self._segment = executor.depths.index(depth)  # whose end the exit stands at

    def draft(self, rows: Many[Sequence], budgets: Many[DraftBudget]) -> list[Draft]:
        # The last draft is not fed, so there may be one more than a budget has.
        made = [Drafts(b._replace(max_drafts=b.max_drafts + 1, min_probability=0)) for b in budgets]
        fed, going = [list[int]() for _ in rows], list[tuple[Sequence, Drafts, list[int]]]()
        for one in zip(rows, made, fed, strict=True):
            opened, one[0].opened = one[0].opened, None
            if opened is None or one[1].add(opened.token, opened.score):
                going.append(one)
        while going:
            newest = [(drafts.ids or row.ids)[-1] for row, drafts, _ in going]
            queries = [Query(row.sampler, row.rule, [*row.ids, *d.ids]) for row, d, _ in going]
            output = self._feed([row for row, _, _ in going], newest)
            verdicts, further = self._heads.verdicts(self.depth, output, queries), []
            for one, token, verdict in zip(going, newest, verdicts, strict=True):
                row, drafts, own = one
                own.append(token)
                if isinstance(verdict, Exception):
                    row.error = verdict
                elif verdict is not None and row.rule.exits(self.depth, verdict):
                    further += [one] * drafts.add(verdict.token, verdict.score)
            going = further
        return [Draft(own, d.ids, d.product) for own, d in zip(fed, made, strict=True)]

    def _feed(self, rows: Many[Sequence], ids: Many[int]) -> Any:
        """Feed a token of each sequence as far as the exit."""
        output = self._executor.feed(*places_of(rows, ids), needs_exit=not self._segment)
        for row in rows:
            row.ran[0] += 1
        for segment in range(1, self._segment + 1):
            asked = range(len(rows)) if segment == self._segment else ()
            output = self._run(segment, rows, asked)
        return output

    def _run(self, segment: int, rows: Many[Sequence], asked: Many[int]) -> Any:
        spans = [Span(row.handle, row.ran[segment], row.ran[segment - 1]) for row in rows]
        for row in rows:
            row.ran[segment] = row.ran[segment - 1]
        return self._executor.run(segment, spans, asked)

    def verify(self, rows: Many[Sequence], drafts: Many[Draft]) -> Any:
        last = len(self._executor.depths)
        asked, count = list[int](), 0
        for row, draft in zip(rows, drafts, strict=True):
            count += row.ran[0] - row.ran[last]  # with a prompt that waits
            asked.extend(range(count - len(draft.fed) - (not row.ids), count))
        for segment in range(self._segment + 1, last):
            self._run(segment, rows, ())
        return self._run(last, rows, asked)


class CheckedDrafts:
    """A registered drafter, whose drafts are checked before a layer reads them. An invalid draft
    fails its own request alone."""

    def __init__(self, drafter: Drafter, name: str, vocabulary: int) -> None:
        """vocabulary: tokens V of the full model."""
        self.depth, self.keeps, self.verify = drafter.depth, drafter.keeps, drafter.verify
        self._drafter, self._name, self._vocabulary = drafter, name, vocabulary

    def draft(self, rows: Many[Sequence], budgets: Many[DraftBudget]) -> list[Draft]:
        try:
            made = [*self._drafter.draft(rows, budgets)]
            for row, draft, budget in zip(rows, made, budgets, strict=True):
                row.error = self._said(row.error) or self._wrong(row, draft, budget)
        except Exception as error:  # whatever it raises
            for row in rows:
                row.error = self._said(error)
        return [
            made[place] if row.error is None else Draft(row.ids[-1:], [])
            for place, row in enumerate(rows)
        ]

    def _wrong(self, row: Sequence, draft: Draft, budget: DraftBudget) -> InputError | None:
        """What is wrong with a draft; None: nothing."""
        for token in (*draft.fed, *draft.said):
            if type(token) is not int or not 0 <= token < self._vocabulary:
                return self._error(f"wrote {token!r}")
        if draft.fed != [*row.ids[-1:], *draft.said][: min(len(draft.fed), budget.max_drafts + 1)]:
            return self._error(
                f"feeds {draft.fed}, says {draft.said}, and may write {budget.max_drafts}"
            )
        return None

    def _said(self, error: Exception | None) -> Exception | None:
        """The error of a request, in words that a user understands."""
        if error is None or isinstance(error, OfframpError):
            return error
        return self._error(f"failed: {type(error).__name__}: {error}")

    def _error(self, problem: str) -> InputError:
        return InputError(
            f"The drafter {self._name!r} {problem}.",
            f"Let it write ids of tokens, from 0 to {self._vocabulary - 1}, or leave it out of the "
            "policy's drafts.",
        )


DRAFTERS: dict[str, Callable[[Executor, int], Drafter]] = {}
"""What makes a drafter for an executor of a model of depth L, by name."""


def side_by_side(row: Sequence, drafts: Drafts) -> Draft:
    """Return the newest token and its drafts, up to the first that ends the answer."""
    said = drafts.ids
    ended = bool(said) and row.sampler.ends(said[-1])
    return Draft([*row.ids[-1:], *(said[:-1] if ended else said)], said, drafts.product)


def places_of(rows: Many[Sequence], ids: Any) -> tuple[list[Handle], Any, list[int]]:
    """Return the handles, ids and columns at which the next tokens of sequences are fed."""
    return [row.handle for row in rows], ids, [row.ran[0] for row in rows]
