"""What an exit or the full model says next in each sequence, by the sequence's own rules."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from offramp.engine.confidence import FEATURE_SCORES
from offramp.engine.decoding.reader import Query, Word
from offramp.engine.decoding.rule import Verdict
from offramp.engine.executors.bare import head_code
from offramp.engine.exit_check import ExitCheck, ExitOutput, ExitScorer
from offramp.engine.policy import ExitPolicy
from offramp.engine.sampler import NothingAllowed
from offramp.models.backbone import Backbone
from offramp.models.exits import ExitSet


class ExitHeads:
    """Asks exits and the LM head.

    depths: of the exits in use, ascending. policy: score and shortlist; thresholds are each
    query's own.
    """

    def __init__(
        self,
        backbone: Backbone,
        exits: ExitSet | None,
        policy: ExitPolicy,
        depths: Sequence[int],
    ) -> None:
        """Raise `InputError` where what the policy needs is missing."""
        self._backbone, self._depths = backbone, tuple(depths)
        code = head_code(backbone)
        self.logits: partial[Tensor] = partial(backbone.logits, code=code)
        """The full model's [n, V], of final-normed states [n, D]."""
        self._scorer = ExitScorer(backbone, policy, exits, code) if depths else None
        self.needs_previous_state: bool = policy.score in FEATURE_SCORES
        """Whether the score reads more than logits."""
        self._scripted = exits is not None and exits.score is not None

    def computing(self) -> torch.inference_mode:
        """Return a context without gradients."""
        return torch.inference_mode()

    def verdicts(
        self, depth: int, output: ExitOutput, queries: Sequence[Query | None]
    ) -> list[Verdict | Exception | None]:
        """Return what the exit at `depth` says of each token; None where nothing is asked, or
        nothing that the exit can say is allowed; an error where the row's own rules raised one."""
        if output.state is None and output.logits is None:
            return [None] * len(queries)
        look, errors = self._look(depth, output, queries)
        scores: Sequence[float] = [float("nan")] * len(queries)
        if any(q is not None and q.rule.thresholds.get(depth) != 0.0 for q in queries):
            scores = self.scores(look, queries)
        made: list[Verdict | Exception | None] = [
            None if query is None else errors.get(row) or Verdict(-1, scores[row])
            for row, query in enumerate(queries)
        ]
        # Only what is to be written is chosen: processors are asked once for each token.
        exiting = [
            query
            if query is not None
            and isinstance(verdict, Verdict)
            and query.rule.exits(depth, verdict)
            else None
            for query, verdict in zip(queries, made, strict=True)
        ]
        if any(query is not None for query in exiting):
            for row, word in enumerate(self._said(look, exiting)):
                verdict = made[row]
                if exiting[row] is not None and isinstance(verdict, Verdict):
                    made[row] = (
                        word if isinstance(word, Exception) else verdict._replace(token=word)
                    )
        return [None if isinstance(said, NothingAllowed) else said for said in made]

    def _look(
        self, depth: int, output: ExitOutput, queries: Sequence[Query | None]
    ) -> tuple[ExitCheck, dict[int, Exception]]:
        """The exit's output, to be scored; and the errors of constraints, by row."""
        assert self._scorer is not None
        here = self._backbone.here
        entry, constraints = here(output.entry), _Constraints(queries)
        reads = self.needs_previous_state or self._scripted
        look = ExitCheck(
            self._scorer,
            depth,
            None if output.state is None else here(output.state),
            entry,
            None if output.previous is None else here(output.previous),
            constraints if constraints.any else None,
            made=output.logits,
            **(_tokens(queries, entry.device) if reads else {}),
        )
        return look, constraints.errors

    def scores(self, look: ExitCheck, queries: Sequence[Query | None]) -> Sequence[float]:
        """Return what thresholds are compared with, of each token; void where nothing is asked."""
        return look.score.tolist()

    def _said(self, look: ExitCheck, queries: Sequence[Query | None]) -> list[int | Exception]:
        places = look.own_logits.argmax(-1)
        shortlist = look.scorer.shortlist
        tokens = places if shortlist is None else shortlist[places]
        chosen: list[int | Exception] = tokens.tolist()
        for i, query in enumerate(queries):
            if query is not None and not query.sampler.plain:
                try:
                    chosen[i] = query.sampler.choose(look.logits[i : i + 1], query.before)
                except Exception as error:  # a processor of the caller's: its request alone fails
                    chosen[i] = error
        return chosen

    def words(self, final: Tensor) -> Word:
        """Return the function that picks tokens from final-normed states [n, D]."""
        return self.of_logits(self.logits(final))

    def of_logits(self, logits: Tensor) -> Word:
        """Return the function that picks tokens from raw logits [n, V]."""
        largest: list[int] = logits.argmax(-1).tolist()

        def word(place: int, query: Query) -> int:
            if query.sampler.plain:
                return largest[place]
            return int(query.sampler.choose(logits[place : place + 1], query.before))

        return word


def _tokens(queries: Sequence[Query | None], device: torch.device) -> dict[str, Tensor]:
    """Position in its answer, previous token and row of each token [n]; 0 where none is asked."""
    position, previous, row = [], [], []
    for query in queries:
        before = () if query is None else query.before
        position.append(len(before))
        row.append(0 if query is None else query.sampler.row)
        if query is None:
            previous.append(0)
        else:
            previous.append(before[-1] if before else int(query.sampler.ids[0, -1]))
    return {
        "position": torch.tensor(position, device=device),
        "previous_token": torch.tensor(previous, device=device),
        "row": torch.tensor(row, device=device),
    }


class _Constraints:
    """Puts each row's constraints on its own logits, and keeps the errors by row."""

    def __init__(self, queries: Sequence[Query | None]) -> None:
        self._queries = queries
        self.any = any(query is not None and query.sampler.scored for query in queries)
        self.errors: dict[int, Exception] = {}

    def __call__(self, logits: Tensor) -> Tensor:
        rows = logits.to(torch.float32, copy=True)
        for i, query in enumerate(self._queries):
            if query is not None and query.sampler.scored:
                try:
                    row = query.sampler.constrain(logits[i : i + 1], query.before)
                    rows[i : i + 1] = row.to(rows.device)
                except Exception as error:  # as above
                    self.errors[i] = error
        return rows
