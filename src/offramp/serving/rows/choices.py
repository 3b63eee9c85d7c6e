"""What an exit or the full model says next in each row, by the rows' own rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.engine.confidence import STREAKS
from offramp.engine.exit_check import ExitCheck, ExitScorer, gates_of_policy
from offramp.engine.policy import ExitPolicy
from offramp.engine.slots.runner import States
from offramp.errors import InputError
from offramp.models.backbone import Backbone
from offramp.models.exits import ExitSet
from offramp.serving.rows.rules import RowRules

Question = tuple[RowRules, list[int]]
"""A row's rules, and the tokens of its answer that stand before the one in question."""


@dataclass(frozen=True)
class Verdict:
    """What an exit says of a row's next token. open: whether its gate let it look."""

    token: int
    score: float
    open: bool


def check_policy(policy: ExitPolicy) -> None:
    """Raise `InputError` for what rows of a batch cannot do."""
    if policy.kv != "recompute":
        raise InputError(
            f"KV policy {policy.kv!r} is approximate, and a batch shares exact keys and values.",
            "Use kv='recompute'.",
        )
    if policy.score in STREAKS and len(policy.depths) > 1:
        raise InputError(
            f"The score {policy.score!r} follows a token from exit to exit; in a batch none does.",
            "Use a score of one exit's logits, such as 'max_probability', or a single exit.",
        )


class Chooser:
    """Asks exits and the LM head. depths: of the exits in use, ascending."""

    def __init__(
        self,
        backbone: Backbone,
        exits: ExitSet | None,
        policy: ExitPolicy,
        depths: Sequence[int],
    ) -> None:
        check_policy(policy)
        self._backbone = backbone
        self._scorer = ExitScorer(backbone, policy, depths, exits) if depths else None
        self._gates = gates_of_policy(policy, exits) if exits is not None else {}

    def verdicts(
        self, depth: int, states: States, asked: Sequence[Question | None]
    ) -> list[Verdict | Exception | None]:
        """Of the exit at `depth` in each row; None where nothing is asked, an error where the
        row's own rules raised one."""
        assert self._scorer is not None
        entry = states.entries[depth]
        chain = _Constraints(asked)
        constrain = chain if chain.any else None
        look = self._scorer(
            depth,
            states.exits[depth],
            entry,
            states.previous.get(depth),
            constrain,
            **_tokens(asked, entry.device),
        )
        score = look.score
        on = torch.ones_like(score, dtype=torch.bool)
        if depth in self._gates:
            gate, level = self._gates[depth]
            on = gate(entry) >= level
        said = self._said(look, asked)
        scores, opened = torch.stack([score.double(), on.double()]).tolist()
        return [
            None
            if question is None
            else chain.errors.get(i)
            or (
                token
                if isinstance(token, Exception)
                else Verdict(token, scores[i], bool(opened[i]))
            )
            for i, (question, token) in enumerate(zip(asked, said, strict=True))
        ]

    def _said(self, look: ExitCheck, asked: Sequence[Question | None]) -> list[int | Exception]:
        assert self._scorer is not None
        places = look.own_logits.argmax(-1)
        shortlist = self._scorer.shortlist
        tokens = places if shortlist is None else shortlist[places]
        return _by_rules(tokens, lambda i: look.logits[i : i + 1], asked)

    def full(self, final: Tensor, asked: Sequence[Question]) -> list[int | Exception]:
        """The full model's next token in each row, from final-normed states [N, D]."""
        logits = self._backbone.logits(final)
        return _by_rules(logits.argmax(-1), lambda i: logits[i : i + 1], asked)


def _tokens(asked: Sequence[Question | None], device: torch.device) -> dict[str, Tensor]:
    """Position in its answer and previous token of each row's token [N]; 0 where none is asked."""
    position, previous = [], []
    for question in asked:
        if question is None:
            position.append(0)
            previous.append(0)
        else:
            rules, before = question
            position.append(len(before))
            previous.append(before[-1] if before else int(rules.ids[0, -1]))
    return {
        "position": torch.tensor(position, device=device),
        "previous_token": torch.tensor(previous, device=device),
    }


def _by_rules(
    tokens: Tensor, logits: Callable[[int], Tensor], asked: Sequence[Question | None]
) -> list[int | Exception]:
    """The largest logits' `tokens` [N], but where a row has rules of its own."""
    chosen: list[int | Exception] = tokens.tolist()
    for i, question in enumerate(asked):
        if question is not None and not question[0].plain:
            rules, before = question
            try:
                chosen[i] = rules.choose(logits(i), before)
            except Exception as error:  # a processor of the caller's: its request alone fails
                chosen[i] = error
    return chosen


class _Constraints:
    """Puts each row's constraints on its own logits; errors by row."""

    def __init__(self, asked: Sequence[Question | None]) -> None:
        self._asked = asked
        self.any = any(question is not None and question[0].scored for question in asked)
        self.errors: dict[int, Exception] = {}

    def __call__(self, logits: Tensor) -> Tensor:
        rows = logits.to(torch.float32, copy=True)
        for i, question in enumerate(self._asked):
            if question is not None and question[0].scored:
                try:
                    rows[i : i + 1] = question[0].constrain(logits[i : i + 1], question[1])
                except Exception as error:  # as above
                    self.errors[i] = error
        return rows
