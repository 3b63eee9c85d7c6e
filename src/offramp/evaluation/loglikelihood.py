"""Candidate answers ranked by their likelihood, each token at the depth where it would leave."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp.data.example import Example
from offramp.engine.exit_check import ExitDecider, decider_of
from offramp.engine.kv_cache import CACHE_NAMES, add_exit_entries
from offramp.engine.policy import FULL, ExitPolicy, first_token_may_exit
from offramp.engine.prefill import Prefill, prepare
from offramp.models.backbone import Backbone
from offramp.models.exits import Exits, ExitSet, first
from offramp.models.input_processor import InputProcessor
from offramp.models.intercept import InterceptedModel


def follows_policy(policy: ExitPolicy) -> bool:
    """Whether the likelihood of a given text is well defined under this policy.

    With exact keys and values the logits at (token, depth) do not depend on where earlier tokens
    left, so one pass over a candidate tells every token's exit and its probability there. With
    propagated ones they do; candidates are then ranked by the full model. So they are in lossless
    mode, where what comes out is the full model's.
    """
    return policy.kv == "recompute" and not policy.lossless


@torch.inference_mode()
def candidate_scores(
    encoder: InputProcessor,
    example: Example,
    candidates: Sequence[str],
    *,
    exits: ExitSet | Exits | None = None,
    policy: ExitPolicy = FULL,
    ranking: str = "sum",
    at_once: int = 25,
) -> list[float]:
    """Log-likelihood of each candidate after the example's prompt, its end token included.

    The prompt is read once; candidates follow it teacher-forced, `at_once` in a pass. Under a
    policy each token counts with its probability at the depth where it would leave. All layers
    run all the same, so this takes as long as the full model.

    Raises:
        DataError: a candidate is longer than the backbone's positions.
    """
    backbone = encoder.backbone
    ids = [encoder.answer_ids(example.prompt, text) for text in candidates]
    prompts = encoder.prompts([example])
    encoder.check_room(prompts, [(example.key, max(map(len, ids)))])
    attached = None if exits is None else ExitSet.of(exits)
    decider = decider_of(backbone, attached, policy)
    depths = () if decider is None else tuple(decider.thresholds)
    driver = _ReadAll(backbone, attached, depths)
    view = InterceptedModel(backbone, driver)
    pick = _Pick(backbone, policy, decider)
    prepared = prepare(view.model, prompts, max_new_tokens=1)
    add_exit_entries(prepared.cache, attached.entries if attached is not None and depths else ())
    prefill = Prefill(view, prepared)
    prompt = driver.take(-1)
    likelihoods: list[float] = []
    for start in range(0, len(ids), at_once):
        rows, mask = encoder.pad(ids[start : start + at_once])
        states = [{d: s.expand(len(rows), -1, -1) for d, s in part.items()} for part in prompt]
        if rows.shape[1] > 1:
            again = copy.copy(prefill)  # `extend` moves its positions on
            view.stack(
                input_ids=rows[:, :-1], **_repeated(again.extend(rows.shape[1] - 1), len(rows))
            )
            parts = zip(states, driver.take(0), strict=True)
            states = [{d: torch.cat([a[d], b[d]], 1) for d in a} for a, b in parts]
        log_p = torch.where(mask, pick(states[0], states[1], rows), 0.0).double().sum(1)
        likelihoods += (log_p / mask.sum(1) if ranking == "mean" else log_p).tolist()
    return likelihoods


class _ReadAll:
    """A driver that runs every layer and, on the way, the exits at `depths`."""

    def __init__(self, backbone: Backbone, exits: ExitSet | None, depths: Sequence[int]) -> None:
        self._exits, self._depths, self._last = exits, frozenset(depths), backbone.depth - 1
        self._noted = frozenset(d - k for d in depths for k in (0, 1))  # "saturation" reads both
        self.entries: dict[int, Tensor] = {}
        self.states: dict[int, Tensor] = {}

    def layer(
        self,
        index: int,
        layer: nn.Module,
        hidden: Tensor,
        args: tuple[Any, ...],
        kw: dict[str, Any],
    ) -> Any:
        if index in self._noted:
            self.entries[index] = hidden
        if index in self._depths:
            assert self._exits is not None
            self.states[index] = self._exits.run(index, hidden, args, kw)
        out = layer(hidden, *args, **kw)
        if index == self._last:
            self.states[self._last + 1] = first(out)
        return out

    def take(self, start: int) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Entries and states by depth of the last call, from token `start` on; L is the model's."""
        return (
            {depth: hidden[:, start:] for depth, hidden in self.entries.items()},
            {depth: state[:, start:] for depth, state in self.states.items()},
        )


class _Pick:
    """Log-probabilities of given tokens, each at the depth where the policy lets it leave."""

    def __init__(self, backbone: Backbone, policy: ExitPolicy, decider: ExitDecider | None) -> None:
        self._backbone, self._decider = backbone, decider
        self._first_too = first_token_may_exit(backbone, policy)

    def __call__(
        self, entries: Mapping[int, Tensor], states: Mapping[int, Tensor], ids: Tensor
    ) -> Tensor:
        """[B, A] for ids [B, A] and, by depth, what predicts them [B, A, D]."""
        full = self._backbone.final_norm(states[self._backbone.depth])
        found = _log_p(self._backbone.logits(full), ids)
        if self._decider is None:
            return found
        open_ = torch.ones_like(ids, dtype=torch.bool)
        open_[:, 0] = self._first_too
        for depth, threshold in self._decider.thresholds.items():
            state = states[depth].flatten(0, 1)
            entry, previous = (entries[d].flatten(0, 1) for d in (depth, depth - 1))
            check = self._decider.scorer(depth, state, entry, previous)
            exits = open_ & (check.score.view_as(ids) >= threshold)
            found = torch.where(exits, _log_p(check.logits.view(*ids.shape, -1), ids), found)
            open_ &= ~exits
        return found


def _log_p(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def _repeated(kw: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The stack's arguments for one row, for many; the cache is copied, not shared."""
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
