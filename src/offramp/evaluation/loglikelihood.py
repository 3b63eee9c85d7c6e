"""Candidate answers ranked by their likelihood, each token at the depth where it would exit."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from offramp.core.decoding.confidence import HEADS, check_thresholds
from offramp.core.decoding.policy import FULL, ExitPolicy, first_token_may_exit
from offramp.core.decoding.rule import ExitRule
from offramp.core.engine.heads import ExitCheck, ExitScorer
from offramp.core.executors.kv_cache import CACHE_NAMES, add_exit_entries
from offramp.core.executors.prefill import Prefill, prepare
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet
from offramp.core.models.intercept import InterceptedModel
from offramp.features.input_processor import InputProcessor
from offramp.features.teacher_forcing import StateRecorder
from offramp.inputs.example import Example


def follows_policy(policy: ExitPolicy) -> bool:
    """Return True if the likelihood of a given text is well defined under this policy.

    The logits at (token, depth) do not depend on where earlier tokens exited, so one pass over a
    candidate gives every token's exit and its probability there. In three cases the full model
    ranks the candidates: a confidence that reads several exits, a token outside the shortlist, and
    lossless answers, which are the full model's.
    """
    return not (policy.score in HEADS or policy.lossless or policy.shortlist)


@torch.inference_mode()
def candidate_scores(
    encoder: InputProcessor,
    example: Example,
    candidates: Sequence[str],
    *,
    exits: ExitSet | Exits | None = None,
    policy: ExitPolicy = FULL,
    at_once: int = 25,
) -> list[float]:
    """Return the log-likelihood of each candidate after the example's prompt, its end token
    included.

    The prompt is read once, and candidates follow it teacher-forced, `at_once` in a pass. Under a
    policy each token counts with its probability at the depth where it would exit. All layers run
    in any case, so this takes as long as the full model.

    Raises:
        DataError: a candidate is longer than the backbone's positions.
    """
    backbone = encoder.backbone
    ids = [encoder.answer_ids(example.prompt, text) for text in candidates]
    prompts = encoder.prompts([example])
    encoder.check_room(prompts, [(example.key, max(map(len, ids)))])
    attached = None if exits is None else ExitSet.of(exits)
    stand = () if attached is None else attached.depths
    thresholds = check_thresholds(dict(policy.thresholds), stand)
    depths = tuple(thresholds)
    entered = {depth - k for depth in depths for k in (0, 1)}  # a score may read both
    handler = StateRecorder(backbone, entered, attached, depths)
    intercepted = InterceptedModel(backbone, handler)
    prepared = prepare(intercepted.model, prompts, max_new_tokens=1)
    add_exit_entries(prepared.cache, attached.entries if attached is not None and depths else ())
    prefill = Prefill(intercepted, prepared)
    prompt = {name: state[:, -1:] for name, state in _taken(handler).items()}
    scorer = ExitScorer(backbone, policy, attached) if depths else None
    pick = _Pick(backbone, policy, thresholds, scorer, int(prepared.ids[0, -1]))
    likelihoods: list[float] = []
    for start in range(0, len(ids), at_once):
        rows, mask = encoder.pad(ids[start : start + at_once])
        states = {name: state.expand(len(rows), -1, -1) for name, state in prompt.items()}
        if rows.shape[1] > 1:
            again = copy.copy(prefill)  # `extend` moves its positions on
            kw = again.extend(rows.shape[1] - 1)
            intercepted.stack(input_ids=rows[:, :-1], **_repeated(kw, len(rows)))
            more = _taken(handler)
            states = {name: torch.cat([state, more[name]], 1) for name, state in states.items()}
        log_p = torch.where(mask, pick(states, rows), 0.0).double().sum(1)
        likelihoods += log_p.tolist()
    return likelihoods


_States = Mapping[tuple[str, int], Tensor]
"""States [B, T, D] that predict tokens: what enters layers, ("entry", depth), what exits make of
it, ("exit", depth), and the final one, _FINAL."""
_FINAL = ("final", 0)


def _taken(recorder: StateRecorder) -> _States:
    entries, exits, final = recorder.take()
    return {
        **{("entry", depth): state for depth, state in entries.items()},
        **{("exit", depth): state for depth, state in exits.items()},
        _FINAL: final,
    }


class _Pick:
    """Log-probabilities of given tokens, each at the depth where the policy lets it exit."""

    def __init__(
        self,
        backbone: Backbone,
        policy: ExitPolicy,
        thresholds: Mapping[int, float],
        scorer: ExitScorer | None,
        before: int,
    ) -> None:
        """before: the token that the answers follow."""
        self._backbone, self._before = backbone, before
        first = policy.opening if first_token_may_exit(backbone, policy) else {}
        self._rule = ExitRule(thresholds, first=first)
        self._scorer = scorer

    def __call__(self, states: _States, ids: Tensor) -> Tensor:
        """[B, A] for ids [B, A] and the states that predict them."""
        full = self._backbone.final_norm(states[_FINAL])
        log_p = _log_p(self._backbone.logits(full), ids)
        if self._scorer is None:
            return log_p
        token = {
            "position": torch.arange(ids.shape[1], device=ids.device).expand_as(ids).flatten(),
            "previous_token": torch.cat(
                [torch.full_like(ids[:, :1], self._before), ids[:, :-1]], 1
            ).flatten(),
        }
        open_ = torch.ones_like(ids, dtype=torch.bool)
        for depth in self._rule.thresholds:
            names = (("exit", depth), ("entry", depth), ("entry", depth - 1))
            state, entry, previous = (states[name].flatten(0, 1) for name in names)
            check = ExitCheck(self._scorer, depth, state, entry, previous, None, **token)
            scores, exits = check.score.view_as(ids), open_.clone()
            exits[:, 1:] &= self._rule.reaches(depth, scores[:, 1:])
            exits[:, 0] &= self._rule.opening.reaches(depth, scores[:, 0])
            log_p = torch.where(exits, _log_p(check.logits.view(*ids.shape, -1), ids), log_p)
            open_ &= ~exits
        return log_p


def _log_p(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def _repeated(kw: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Return the stack's arguments for one row, repeated for many; the cache is copied."""
    many: dict[str, Any] = {}
    for name, value in kw.items():
        if name in CACHE_NAMES:
            many[name] = copy.deepcopy(value)
            many[name].batch_repeat_interleave(rows)
        elif name == "position_ids":  # [1, T], and in some families [3, 1, T]
            many[name] = value.repeat_interleave(rows, -2)
        elif isinstance(value, Tensor):
            many[name] = value.repeat_interleave(rows, 0)
        else:
            many[name] = value
    return many
