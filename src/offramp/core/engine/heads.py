"""What an exit or the full model says next in each sequence, by the sequence's own rules.

No more is computed than a decision needs. A score that reads no logits runs no LM head at an exit
where no row exits; at a threshold of 0 no score is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from offramp.core.decoding.confidence import FEATURE_SCORES
from offramp.core.decoding.policy import ExitPolicy, shortlist_of_policy
from offramp.core.decoding.reader import Query, Word
from offramp.core.decoding.rule import ExitVerdict
from offramp.core.decoding.scores import SCORES, max_probability
from offramp.core.engine.sampler import NothingAllowed
from offramp.core.executors.bare import head_code, shortlist_head
from offramp.core.executors.segments import ExitOutput, in_one_copy
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import ExitSet
from offramp.core.models.opened import HeadCode

Constrain = Callable[[Tensor], Tensor]
"""Takes logits [B, V] to those of what may be said."""


class ExitHeads:
    """Asks exits and the LM head.

    depths: of the exits in use, ascending. policy: score and shortlist; thresholds are each
    query's own.
    """

    def __init__(
        self, backbone: Backbone, exits: ExitSet | None, policy: ExitPolicy, depths: Sequence[int]
    ) -> None:
        """Raise `InputError` where what the policy needs is missing."""
        self._depths = tuple(depths)
        code = head_code(backbone)
        self.logits: partial[Tensor] = partial(backbone.logits, code=code)
        """The full model's [n, V], of final-normed states [n, D]."""
        self._scorer = ExitScorer(backbone, policy, exits, code) if depths else None
        self.needs_previous_state: bool = policy.score in FEATURE_SCORES
        """Whether the score reads more than logits."""
        scripted = exits is not None and exits.score is not None
        self._reads_tokens: bool = self.needs_previous_state or scripted

    def computing(self) -> torch.inference_mode:
        """Return a context without gradients."""
        return torch.inference_mode()

    def verdicts(
        self, depth: int, output: ExitOutput, queries: Sequence[Query | None]
    ) -> list[ExitVerdict | Exception | None]:
        """Return the prediction of the exit at `depth` for each query: None where there is no
        query or the exit can say no token that is allowed; an error where the row's own rules
        raised one."""
        if output.state is None and output.logits is None:
            return [None] * len(queries)
        look, errors = self._look(depth, output, queries)
        nan, scored = float("nan"), [q is not None and q.rule.scored(depth) for q in queries]
        known = self.scores(look, queries) if any(scored) else [nan] * len(queries)
        # Of a row that reads none there is none, whoever is asked beside it.
        scores = [score if reads else nan for score, reads in zip(known, scored, strict=True)]
        made: list[ExitVerdict | Exception | None] = [None] * len(queries)
        exiting: dict[int, Query] = {}
        for row, query in enumerate(queries):
            if query is not None and query.sampler.deep != len(query.before):
                made[row] = verdict = errors.get(row) or ExitVerdict(-1, scores[row])
                if isinstance(verdict, ExitVerdict) and query.rule.exits(depth, verdict):
                    exiting[row] = query
        # Only what is to be written is chosen: processors are asked once for each token.
        for row, word in self._said(look, exiting).items():
            made[row] = ExitVerdict(word, scores[row]) if isinstance(word, int) else word
        return [None if isinstance(said, NothingAllowed) else said for said in made]

    def _look(
        self, depth: int, output: ExitOutput, queries: Sequence[Query | None]
    ) -> tuple[ExitCheck, dict[int, Exception]]:
        """The exit's output, to be scored; and the errors of constraints, by row."""
        assert self._scorer is not None
        scored = any(query is not None and query.sampler.scored for query in queries)
        constraints = _Constraints(queries) if scored else None
        look = ExitCheck(
            self._scorer,
            depth,
            output.state,
            output.entry,
            output.previous,
            constraints,
            made=output.logits,
            **(_tokens(queries, output.entry.device) if self._reads_tokens else {}),
        )
        return look, {} if constraints is None else constraints.errors

    def scores(self, look: ExitCheck, queries: Sequence[Query | None]) -> Sequence[float]:
        """Return the scores of each token for the thresholds; unread where the query is None."""
        if self._reads_tokens or look.entry.device.type == "cpu":
            return look.score.tolist()
        scores, look.said = in_one_copy(look.score, look.largest)
        return scores

    def _said(self, look: ExitCheck, exiting: dict[int, Query]) -> dict[int, int | Exception]:
        """What the exit says in each row whose token exits, or the error of the row's own rules."""
        if not exiting:
            return {}
        chosen: dict[int, int | Exception] = {row: int(look.said[row]) for row in exiting}
        for row, query in exiting.items():
            if not query.sampler.plain:
                try:
                    chosen[row] = query.sampler.choose(look.logits[row : row + 1], query.before)
                except Exception as error:  # a processor of the caller's: its request alone fails
                    chosen[row] = error
        return chosen

    def words(self, final: Tensor) -> Word:
        """Return the function that picks tokens from final-normed states [n, D]."""
        return self.of_logits(self.logits(final))

    def of_logits(self, logits: Tensor) -> Word:
        """Return the function that picks tokens from raw logits [n, V]."""
        largest: list[int] = logits.argmax(-1).tolist()

        def word(place: int, query: Query) -> int:
            if query.sampler.keep is not None:
                query.sampler.keep(len(query.before), logits[place])
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


@dataclass(eq=False)
class ExitCheck:
    """A token of each row at one exit. Score and logits are computed when first asked for.

    scorer: of the policy.
    state: the exit's output [B, D] for its input `entry` [B, D], at `depth`. previous: the state
    [B, D] one decoder layer before `entry`, where the score reads it. position: of the token in the
    answer [B], from 0. previous_token: the id [B] before this token. row: of the prompt's batch
    [B]. made: logits [B, S] that the exit computed itself; None: the LM head computes them.
    """

    scorer: ExitScorer
    depth: int
    state: Tensor | None
    entry: Tensor
    previous: Tensor | None = None
    constrain: Constrain | None = None
    position: Tensor | None = None
    previous_token: Tensor | None = None
    row: Tensor | None = None
    made: Tensor | None = None

    @cached_property
    def features(self) -> Tensor:
        """The exit's state after the final norm [B, D]."""
        assert self.state is not None
        return self.scorer.backbone.final_norm(self.state)

    @cached_property
    def own_logits(self) -> Tensor:
        """Logits [B, S] of the tokens that the exit can say: those of the shortlist, or all."""
        if self.made is not None:
            return self.made
        return self.scorer.backbone.logits(self.features, self.scorer.head, code=self.scorer.code)

    @property
    def largest(self) -> Tensor:
        """The id [B] of the largest of `own_logits`."""
        places, ids = self.own_logits.argmax(-1), self.scorer.shortlist
        return places if ids is None else ids[places]

    @cached_property
    def said(self) -> list[float]:
        """The ids `largest` on the host."""
        return self.largest.tolist()

    @cached_property
    def logits(self) -> Tensor:
        """Logits [B, V] of the whole vocabulary, before the constraints of the row."""
        ids = self.scorer.shortlist
        if ids is None:
            return self.own_logits
        whole = self.own_logits.new_full(
            (len(self.own_logits), self.scorer.backbone.vocabulary), float("-inf")
        )
        return whole.index_copy_(1, ids, self.own_logits)

    @property
    def allowed(self) -> Tensor:
        """Logits [B, S] after the row's constraints: scores are about allowed tokens alone."""
        if self.constrain is None:
            return self.own_logits
        whole, ids = self.constrain(self.logits), self.scorer.shortlist
        return whole if ids is None else whole[:, ids]

    @property
    def exits(self) -> ExitSet | None:
        """Return the exits that are asked; None where the model has none."""
        return self.scorer.exits

    @cached_property
    def score(self) -> Tensor:
        """The confidence score [B], in [0, 1]."""
        return self.scorer.score(self)


class ExitScorer:
    """A policy's score, with the LM head or the head of the shortlist."""

    def __init__(
        self,
        backbone: Backbone,
        policy: ExitPolicy,
        exits: ExitSet | None = None,
        code: HeadCode | None = None,
    ) -> None:
        """code: called in place of the LM head.

        Raises:
            InputError: the policy needs a shortlist, and there is none.
        """
        self.backbone: Backbone = backbone
        self.exits: ExitSet | None = exits
        self.code: HeadCode | None = code
        self.shortlist: Tensor | None = shortlist_of_policy(policy, exits)
        own = None if exits is None else exits.score
        self.score: Callable[..., Tensor] = _score_of(policy) if own is None else own

    @cached_property
    def head(self) -> nn.Module | None:
        """Return the LM head of the shortlist; None: the model's own head is used."""
        if self.exits is None or self.shortlist is None:
            return None
        with torch.inference_mode(False):  # it is kept, and may be asked for in training
            return shortlist_head(self.backbone, self.exits)


def _score_of(policy: ExitPolicy) -> Callable[[ExitCheck], Tensor]:
    """Return the policy's score, looked up by name at each call: it may be registered anew."""
    name = policy.score

    def score(check: ExitCheck) -> Tensor:
        if name in FEATURE_SCORES:
            return FEATURE_SCORES[name](check)
        return SCORES.get(name, max_probability)(check.allowed)  # else heads score by themselves

    return score
