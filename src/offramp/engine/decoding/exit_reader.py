"""What an exit or the full model says next in each sequence, by its own rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from offramp.engine.confidence import FEATURE_SCORES, STREAKS
from offramp.engine.constraint import NothingAllowed
from offramp.engine.decoding.reader import Question, Word
from offramp.engine.decoding.rule import CLOSED, Verdict
from offramp.engine.executors.modules.in_place import head_code
from offramp.engine.exit_check import ExitCheck, ExitOutput, ExitScorer, gates_of_policy
from offramp.engine.policy import ExitPolicy
from offramp.errors import InputError
from offramp.models.backbone import Backbone
from offramp.models.exits import ExitSet
from offramp.models.shortlist import Gate


def check_company(policy: ExitPolicy) -> None:
    """Raise `InputError` for what sequences of several requests cannot share."""
    if policy.kv != "recompute":
        raise InputError(
            f"KV policy {policy.kv!r} is approximate, and a batch shares exact keys and values.",
            "Use kv='recompute'.",
        )


class ExitReader:
    """Asks exits and the LM head.

    depths: of the exits in use, ascending. policy: score, weights, shortlist, and which exits have
    gates; thresholds and gates' levels are each question's own.
    """

    def __init__(
        self,
        backbone: Backbone,
        exits: ExitSet | None,
        policy: ExitPolicy,
        depths: Sequence[int],
    ) -> None:
        """Raise `InputError` where what the policy needs is missing."""
        self._backbone, self._exits, self._policy = backbone, exits, policy
        self._depths, self._code = tuple(depths), head_code(backbone)
        self.logits = partial(backbone.logits, code=self._code)
        """The full model's [n, V], of final-normed states [n, D]."""
        self._scorer = self._new_scorer() if depths else None
        gates = gates_of_policy(policy, exits) if exits is not None else {}
        self._gates = {depth: gate for depth, (gate, _) in gates.items()}
        self.follows = policy.score in STREAKS and len(self._depths) > 1
        """Whether a score follows a token from exit to exit."""
        self._following: WeakKeyDictionary[Any, ExitScorer] = WeakKeyDictionary()  # by sampler
        self.watches = policy.score in FEATURE_SCORES
        """Whether the score reads more than logits."""
        self._scripted = exits is not None and exits.score is not None

    def computing(self) -> torch.inference_mode:
        """Without gradients."""
        return torch.inference_mode()

    def _new_scorer(self) -> ExitScorer:
        return ExitScorer(self._backbone, self._policy, self._depths, self._exits, self._code)

    def looks(self, asked: Sequence[Question | None]) -> Callable[[int, Tensor], bool]:
        """Whether any of the questions is put to the exit at a depth, past its gate."""

        rules = [q.rule for q in asked if q is not None]  # an executor may keep this: no requests

        def any_at(depth: int, entry: Tensor) -> bool:
            gates = [rule.gates for rule in rules if depth in rule.thresholds]
            if not gates:
                return False
            if not all(depth in levels for levels in gates):
                return True
            least = min(levels[depth] for levels in gates)
            foretold = self._asked(self._gates[depth], self._backbone.here(entry))
            return bool((foretold >= least).any())

        return any_at

    def _asked(self, gate: Gate, entry: Tensor) -> Tensor:
        """What a gate says of states [n, D]; of each by itself, where batches are to be exact."""
        if self._backbone.decoding.exact_batches:
            return torch.cat([gate(row[None]) for row in entry])
        return gate(entry)

    def verdicts(
        self, depth: int, output: ExitOutput, asked: Sequence[Question | None]
    ) -> list[Verdict | Exception | None]:
        """Of the exit at `depth` on each token; None where nothing is asked, an error where the
        row's own rules raised one."""
        if output.state is None and output.logits is None:
            return [None if question is None else CLOSED for question in asked]
        if not self.follows:
            return self._of_all(depth, output, asked, self._scorer)
        made: list[Verdict | Exception | None] = []
        for i, question in enumerate(asked):
            if question is None:
                made.append(None)
                continue
            if question.sampler not in self._following:
                self._following[question.sampler] = self._new_scorer()
            own = output.picked(slice(i, i + 1))
            made += self._of_all(depth, own, [question], self._following[question.sampler])
        return made

    def _of_all(
        self,
        depth: int,
        output: ExitOutput,
        asked: Sequence[Question | None],
        scorer: ExitScorer | None,
    ) -> list[Verdict | Exception | None]:
        assert scorer is not None
        here = self._backbone.here
        entry = here(output.entry)
        opened = [True] * len(asked)
        levels = [None if q is None else q.rule.gates.get(depth) for q in asked]
        if any(level is not None for level in levels):
            foretold = self._asked(self._gates[depth], entry).tolist()
            opened = [
                level is None or said >= level for said, level in zip(foretold, levels, strict=True)
            ]
            if not any(o for o, q in zip(opened, asked, strict=True) if q is not None):
                return [None if question is None else CLOSED for question in asked]
        chain = _Constraints(asked)
        places = _tokens(asked, entry.device) if self.watches or self._scripted else {}
        look = ExitCheck(
            scorer,
            depth,
            None if output.state is None else here(output.state),
            entry,
            None if output.previous is None else here(output.previous),
            chain if chain.any else None,
            made=output.logits,
            **places,
        )
        scored = any(q is not None and q.rule.thresholds.get(depth) != 0.0 for q in asked)
        scores = self.scores(look, asked) if scored else [float("nan")] * len(asked)
        made: list[Verdict | Exception | None] = [
            None
            if question is None
            else _verdict(chain.errors.get(i) or Verdict(-1, scores[i], opened[i]))
            for i, question in enumerate(asked)
        ]
        # Only what is to be said is chosen: processors are asked once for a token that stands.
        wanted = [
            question if isinstance(verdict, Verdict) and _says(question, depth, verdict) else None
            for question, verdict in zip(asked, made, strict=True)
        ]
        if any(question is not None for question in wanted):
            for i, word in enumerate(self._said(look, wanted)):
                verdict = made[i]
                if wanted[i] is not None and isinstance(verdict, Verdict):
                    made[i] = _verdict(
                        word if isinstance(word, Exception) else verdict._replace(token=word)
                    )
        return made

    def scores(self, look: ExitCheck, asked: Sequence[Question | None]) -> Sequence[float]:
        """What thresholds are compared with, of each token; void where nothing is asked."""
        return look.score.tolist()

    def _said(self, look: ExitCheck, asked: Sequence[Question | None]) -> list[int | Exception]:
        places = look.own_logits.argmax(-1)
        shortlist = look.scorer.shortlist
        tokens = places if shortlist is None else shortlist[places]
        chosen: list[int | Exception] = tokens.tolist()
        for i, question in enumerate(asked):
            if question is not None and not question.sampler.plain:
                try:
                    chosen[i] = question.sampler.choose(look.logits[i : i + 1], question.before)
                except Exception as error:  # a processor of the caller's: its request alone fails
                    chosen[i] = error
        return chosen

    def words(self, final: Tensor) -> Word:
        """What the full model says behind final-normed states [n, D]."""
        return self.of_logits(self.logits(final))

    def of_logits(self, logits: Tensor) -> Word:
        """What raw logits [n, V] say."""
        largest: list[int] = logits.argmax(-1).tolist()

        def word(place: int, question: Question) -> int:
            if question.sampler.plain:
                return largest[place]
            return int(question.sampler.choose(logits[place : place + 1], question.before))

        return word


def _verdict(said: Verdict | Exception) -> Verdict | Exception:
    """An exit that can say nothing that is allowed, of few tokens, was not there."""
    return CLOSED if isinstance(said, NothingAllowed) else said


def _says(question: Question | None, depth: int, verdict: Verdict) -> bool:
    """Whether the sequence goes on from what the exit says."""
    if question is None:
        return False
    return question.rule.exits(depth, verdict) or question.rule.guesses_at(depth, verdict)


def _tokens(asked: Sequence[Question | None], device: torch.device) -> dict[str, Tensor]:
    """Position in its answer, previous token and row of each token [n]; 0 where none is asked."""
    position, previous, row = [], [], []
    for question in asked:
        before = () if question is None else question.before
        position.append(len(before))
        row.append(0 if question is None else question.sampler.row)
        if question is None:
            previous.append(0)
        else:
            previous.append(before[-1] if before else int(question.sampler.ids[0, -1]))
    return {
        "position": torch.tensor(position, device=device),
        "previous_token": torch.tensor(previous, device=device),
        "row": torch.tensor(row, device=device),
    }


class _Constraints:
    """Puts each row's constraints on its own logits; errors by row."""

    def __init__(self, asked: Sequence[Question | None]) -> None:
        self._asked = asked
        self.any = any(question is not None and question.sampler.scored for question in asked)
        self.errors: dict[int, Exception] = {}

    def __call__(self, logits: Tensor) -> Tensor:
        rows = logits.to(torch.float32, copy=True)
        for i, question in enumerate(self._asked):
            if question is not None and question.sampler.scored:
                try:
                    row = question.sampler.constrain(logits[i : i + 1], question.before)
                    rows[i : i + 1] = row.to(rows.device)
                except Exception as error:  # as above
                    self.errors[i] = error
        return rows
