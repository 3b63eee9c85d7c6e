"""A shortlist and gates for trained exits, learnt from the full model's own answers: no labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from offramp.adapter import Adapter
from offramp.answers import full_model_answers
from offramp.calibration.cost_model import Costs, gate_gain
from offramp.data.example import Example, split_examples
from offramp.engine.confidence import SCORES
from offramp.engine.exit_check import shortlist_of_policy
from offramp.engine.policy import ExitPolicy
from offramp.engine.teacher_forcing import Answered, exit_features, group, record
from offramp.errors import InputError
from offramp.models.exits import ExitSet
from offramp.models.input_processor import InputProcessor
from offramp.models.shortlist import Gate, fit_gate, gate_level, shortlist_of

HELD_OUT = 0.3
"""Share of the images on which misses are counted and the gates' levels are set."""
SURE, LOST = 0.9, 0.01
"""A gate may shut out this share of the tokens whose score is at least `SURE`."""


def learn_shortlist_and_gates(
    adapter: Adapter,
    encoder: InputProcessor,
    examples: Sequence[Example],
    *,
    shortlist: int | None = None,
    gates: bool = False,
    costs: Costs | None = None,
    max_new_tokens: int = 40,
    batch_size: int = 32,
    progress: Any = iter,
) -> Adapter:
    """The adapter with a shortlist of at most so many tokens, and with gates where they pay.

    Gates may be added to a shortlist that is there; a new shortlist removes the old gates. Its
    policy uses what was learnt; its thresholds, which were chosen without, are removed.
    `ExitSet.measured` has what was measured.

    examples: may be those of training; labels are not read. costs: of decoding on this machine, by
    `offramp.calibration.profiler.measure_costs`; gates need them.

    Raises:
        DataError: too few images to hold some out.
        InputError: a shortlist of less than 2 tokens, or gates without costs.
    """
    if gates and costs is None:
        raise InputError(
            "Whether a gate pays depends on the costs of decoding, and none were given.",
            "Measure them: offramp.calibration.profiler.measure_costs(backbone, inputs, exits).",
        )
    parts = split_examples(examples, {"learn": 1 - HELD_OUT, "held_out": HELD_OUT}, seed=0)
    options: dict[str, Any] = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    rows = {name: full_model_answers(encoder, part, **options) for name, part in parts.items()}
    exits, measured = adapter.exits, dict(adapter.exits.measured)
    # Without thresholds, and without the KV policy, which a score does not depend on.
    fields = ("score", "exit_in_prefill", "first", "shortlist", "gates")
    policy = ExitPolicy(**{name: getattr(adapter.policy, name) for name in fields})
    if shortlist is not None:
        exits, measured = _with_shortlist(encoder, exits, rows, shortlist)
        policy = replace(policy, shortlist=True, gates={})
    if costs is not None and gates:
        scored = {
            name: _scored_states(encoder, exits, part, policy, batch_size, progress)
            for name, part in rows.items()
        }
        fitted, levels, measured["gates"] = _gates(scored, costs)
        exits, policy = replace(exits, gates=fitted), replace(policy, gates=levels)
    return replace(
        adapter, exits=replace(exits, measured=measured), policy=policy, calibration=None
    )


def _with_shortlist(
    encoder: InputProcessor, exits: ExitSet, rows: dict[str, list[Answered]], size: int
) -> tuple[ExitSet, dict[str, Any]]:
    """The exits with a shortlist and no gates, and what was measured of it."""
    learn, held_out = ([row.ids for row in rows[name]] for name in ("learn", "held_out"))
    ids, measured = shortlist_of(learn, held_out, size)
    device = encoder.backbone.device
    with_ids = ExitSet(exits.modules, ids.to(device), discriminators=exits.discriminators)
    return with_ids, {"shortlist": measured}


def _gates(
    scored: dict[str, dict[int, tuple[Tensor, Tensor]]], costs: Costs
) -> tuple[dict[int, Gate], dict[int, float], dict[str, Any]]:
    """Gates by depth, the levels of those that pay, and what was measured of each."""
    gates, levels, measured = {}, {}, {}
    for depth, (states, scores) in scored["learn"].items():
        gates[depth] = fit_gate(states, scores)
        entered, actual = scored["held_out"][depth]
        guesses = gates[depth](entered)
        level = gate_level(guesses, actual, sure=SURE, lost=LOST)
        closed = guesses < level
        shut, lost = float(closed.float().mean()), float((closed & (actual >= SURE)).float().mean())
        gain = gate_gain(costs, depth, shut=shut, lost=lost)
        if gain > 0:
            levels[depth] = level
        measured[str(depth)] = {
            "level": level, "shut": shut, "lost": lost, "tokens": len(actual),
            "gain_layers": gain / costs.layer[0], "used": gain > 0,
        }  # fmt: skip
    return gates, levels, measured


@torch.inference_mode()
def _scored_states(
    encoder: InputProcessor,
    exits: ExitSet,
    rows: Sequence[Answered],
    policy: ExitPolicy,
    batch_size: int,
    progress: Any,
) -> dict[int, tuple[Tensor, Tensor]]:
    """By depth, the states [N, D] that enter the exit at N tokens, and its scores [N]."""
    backbone = encoder.backbone
    ids = shortlist_of_policy(policy, exits)
    head = None if ids is None else exits.shortlist_head(backbone)
    scored: dict[int, list[tuple[Tensor, Tensor]]] = {d: [] for d in exits.depths}
    for answered in progress(group(rows, batch_size)):
        batch = record(encoder, answered, exits.depths)
        for depth, features in exit_features(backbone, exits.modules, batch).items():
            logits = backbone.logits(features[batch.mask], head)
            scores = SCORES[policy.score](logits).float()
            scored[depth].append((batch.entries(depth)[batch.mask].float(), scores))
    return {
        depth: (torch.cat([s for s, _ in parts]), torch.cat([s for _, s in parts]))
        for depth, parts in scored.items()
    }
