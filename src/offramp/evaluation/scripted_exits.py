"""Exits that follow a plan instead of confidence: speed can be measured on any weights.

Everything is paid as usual: the exit's layer, the head, the real score, its transfer. Only the
verdict is replaced, and for lossless runs one logit is raised, which decides what the exit drafts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from offramp.core.decoding.drafting import Draft, DraftBudget, Drafter
from offramp.core.decoding.policy import ExitPolicy, GenerationOutput
from offramp.core.decoding.scores import SCORES
from offramp.core.decoding.sequence import Sequence as Answer
from offramp.core.engine.generate import generate
from offramp.core.engine.heads import ExitCheck
from offramp.core.engine.plan import plan_of
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet

OPTIONS: dict[str, Any] = {"do_sample": False, "num_beams": 1, "eos_token_id": None}
"""Greedy, and to the last token asked for: random weights may end a sentence anywhere."""


class Script:
    """A plan of which tokens exit at one exit, by position in the answer.

    leave: [N, B]; whether the token at each position exits (position 0 comes from the prefill);
    after the plan none does. says: [N] tokens that the exit must predict at these positions (batch
    1), or None for its own; with a shortlist, their places in it. score: the real score, which is
    computed so that its time counts.
    """

    def __init__(
        self, leave: Tensor, *, says: Tensor | None = None, score: str = "max_probability"
    ) -> None:
        self._leave = torch.cat([leave, leave.new_zeros(1, leave.shape[1])])
        self._says, self._score = says, SCORES[score]

    def judge(self, check: ExitCheck) -> Tensor:
        """Return scores [B] for a check of B tokens: 1 where the plan says exit, else 0."""
        assert check.position is not None and check.row is not None
        verdict = self._score(check.allowed) * 0  # not a new tensor, which would not wait for it
        if self._says is not None:
            planned = (check.position < len(self._says)).nonzero().flatten()
            said = self._says.to(planned.device)[check.position[planned]]
            check.own_logits[planned, said] = torch.inf
        position = check.position.clamp(max=len(self._leave) - 1)
        return verdict + self._leave.to(position.device)[position, check.row].to(verdict)


def generate_forced(
    backbone: Backbone,
    inputs: Mapping[str, Any],
    exits: ExitSet | Exits,
    script: Script,
    tokens: int,
    *,
    depth: int | None = None,
    criteria: Sequence[StoppingCriteria] = (),
    **policy: Any,
) -> GenerationOutput:
    """Write `tokens` tokens, exiting at `depth` (the first exit) as `script` says.

    policy: fields of `ExitPolicy` besides thresholds and score.
    """
    at = exits.depths[0] if depth is None else depth
    return generate(
        backbone,
        inputs,
        exits=replace(ExitSet.of(exits), score=script.judge),
        policy=ExitPolicy({at: 0.5}, **policy),
        max_new_tokens=tokens,
        stopping_criteria=StoppingCriteriaList(criteria),
        **OPTIONS,
    )


class ScriptedDrafts:
    """A drafter whose drafts cost what they do, with an answer's `ids` in their places."""

    def __init__(self, drafter: Drafter, ids: Sequence[int]) -> None:
        self.depth, self.keeps, self.verify = drafter.depth, drafter.keeps, drafter.verify
        self._drafter, self._ids = drafter, ids

    def draft(self, rows: Sequence[Answer], budgets: Sequence[DraftBudget]) -> list[Draft]:
        """Return the scripted drafts, as many as the drafter makes."""
        made = self._drafter.draft(rows, budgets)
        return [self._said(row, draft) for row, draft in zip(rows, made, strict=True)]

    def _said(self, row: Answer, draft: Draft) -> Draft:
        said = [*self._ids[len(row.ids) :][: len(draft.said)]]
        ended = bool(said) and row.sampler.ends(said[-1])
        return Draft([*row.ids[-1:], *(said[:-1] if ended else said)], said, draft.product)


def generate_drafted(
    backbone: Backbone,
    inputs: Mapping[str, Any],
    exits: ExitSet,
    ids: Sequence[int],
    *,
    depth: int,
    criteria: Sequence[StoppingCriteria] = (),
    max_new_tokens: int,
    **policy: Any,
) -> GenerationOutput:
    """Write one answer, for which the exit at `depth`, which drafts on, drafts these `ids`.

    policy: fields of `ExitPolicy` besides drafts.
    """
    plan = plan_of(backbone, exits, ExitPolicy(drafts={depth: 0.0}, **policy))
    drafter = plan.drafter
    assert drafter is not None
    scripted = replace(plan, drafter=lambda *of: ScriptedDrafts(drafter(*of), ids))
    return generate(
        backbone,
        inputs,
        planned=lambda: scripted,
        max_new_tokens=max_new_tokens,
        stopping_criteria=StoppingCriteriaList(criteria),
        do_sample=False,
        num_beams=1,
    )
