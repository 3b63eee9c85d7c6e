"""Laws of decoding without the stack's own code: every bit as with it, and less of it run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import families
import pytest
import torch
from decoding import always
from families import NAMES
from reference import Dice

import offramp.engine.model_runner as model_runner
from offramp.engine.generate import generate
from offramp.engine.executors.modules import arguments, cache, stack
from offramp.engine.executors.modules.bare import bare
from offramp.engine.policy import FULL, ExitPolicy
from offramp.models.backbone import Backbone

GREEDY = {"max_new_tokens": 10, "do_sample": False}


@pytest.fixture
def both(monkeypatch, scored):
    """What the stack itself makes of a request, and what is made without it."""
    used = []

    def noted(*args):
        used.append(stack.lean_stack(*args))
        return used[-1]

    monkeypatch.setattr(model_runner, "lean_stack", noted)

    def run(whole, inputs, *, dice=None, lean=True, **given):
        made: list[Any] = []
        used.clear()
        for without in (False, True):
            monkeypatch.setattr(whole, "lean_decoding", without)
            if dice is not None:
                scored(Dice(dice))
            made.append(generate(whole, inputs, **{**GREEDY, **given}))
        assert len(used) == 1 and (used.pop() is not None) is lean
        return made

    return run


def same(theirs, ours):
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(ours.depths, theirs.depths)
    assert torch.equal(ours.scores.nan_to_num(-1.0), theirs.scores.nan_to_num(-1.0))
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_depths_and_scores_are_the_stacks(name, dtype, backbone, exits, batch, both):
    whole, parts, inputs = backbone(name, dtype), exits(name, dtype), batch(name, 1, dtype)
    first, second = parts.depths
    given = {"exits": parts}
    same(*both(whole, inputs, policy=ExitPolicy(dict.fromkeys(parts.depths, 0.03)), **given))
    if dtype == torch.float32:
        same(*both(whole, inputs, policy=FULL))
        same(*both(whole, inputs, policy=always(name), **given))
        drafts = ExitPolicy({first: 0.4}, lossless=True)
        assert same(*both(whole, inputs, policy=drafts, dice=5, **given)).rounds
        guesses = ExitPolicy({first: 0.6}, guesses={first: 0.1})
        same(*both(whole, inputs, policy=guesses, dice=5, **given))
    rule = ExitPolicy({first: 0.4, second: 0.5}, exit_in_prefill=True)
    mixed = same(*both(whole, inputs, policy=rule, dice=5, **given))
    assert len(mixed.depths.unique()) == 3


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "gemma3", "llava", "florence2"])
def test_rows_that_end_and_padding_are_the_stacks(name, backbone, exits, batch, both):
    whole, inputs = backbone(name), batch(name, 4)
    end = int(generate(whole, inputs, **GREEDY).new_tokens[0, 3])
    rule = ExitPolicy(dict.fromkeys(exits(name).depths, 0.5))
    given = {"exits": exits(name), "eos_token_id": end, "pad_token_id": families.PAD}
    same(*both(whole, inputs, policy=rule, dice=5, **given))
    same(*both(whole, inputs, policy=replace(rule, kv="propagate"), dice=5, **given))


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "gemma3", "paligemma2", "qwen2.5-vl"])
def test_a_long_answer_is_rehearsed_again_and_again(
    name, backbone, exits, batch, both, monkeypatch
):
    """With rollback and catch-up across the ends of what was rehearsed, and of the buffers."""
    monkeypatch.setattr(stack, "TOKENS", 5)
    monkeypatch.setattr(cache, "ROOM", 2)
    whole, inputs, first = backbone(name), batch(name, 1), exits(name).depths[0]
    for rule in (ExitPolicy({first: 0.3}, lossless=True), ExitPolicy({first: 0.3})):
        same(*both(whole, inputs, exits=exits(name), policy=rule, dice=3, max_new_tokens=30))


def test_many_rows_and_the_last_positions_are_the_stacks(backbone, batch, both):
    whole, inputs = Backbone(families.build("blip2-opt")), batch("blip2-opt", 1)
    sampled = {"do_sample": True, "top_k": 1, "num_return_sequences": 60, "max_new_tokens": 3}
    same(*both(whole, inputs, **sampled))
    room = whole.positions - inputs["input_ids"].shape[1]
    same(*both(whole, inputs, max_new_tokens=room + 1))
    mask = torch.ones(1, whole.positions - 2, dtype=torch.long)
    longer = {**inputs, "input_ids": torch.full_like(mask, families.FIRST_WORD)}
    longer["input_ids"][:, :4], longer["attention_mask"] = families.IMAGE, mask
    same(*both(whole, longer, max_new_tokens=3, lean=False))


def test_the_stacks_own_code_runs_for_the_prompt_and_for_rehearsals_alone(backbone, batch, both):
    whole, calls = backbone("llava"), []
    handle = whole.stack.rotary_emb.register_forward_hook(lambda *_: calls.append(1))
    try:
        both(whole, batch("llava", 1), max_new_tokens=40)
    finally:
        handle.remove()
    checked = 2 + 1  # once for a backbone: a rehearsal, and the stack with one token and with three
    assert 40 + 2 <= len(calls) <= 40 + 2 + checked


def test_what_is_not_known_is_left_to_the_stack(backbone, batch, both, monkeypatch):
    inputs = batch("llava", 1)
    known = {n: cut for n, cut in arguments.CUTS.items() if n != "position_embeddings"}
    wrong = {**arguments.CUTS, "position_embeddings": lambda pair, at: (pair[1], pair[0])}
    for cuts in (known, wrong):
        monkeypatch.setattr(arguments, "CUTS", cuts)
        same(*both(Backbone(families.build("llava")), inputs, lean=False))


def test_a_switch_leaves_every_token_to_the_stack(backbone, batch, monkeypatch):
    def never_asked(*_):
        raise AssertionError

    whole = backbone("llava")
    monkeypatch.setattr(model_runner, "lean_stack", never_asked)
    monkeypatch.setattr(whole, "lean_decoding", False)
    generate(whole, batch("llava", 1), **GREEDY)


def test_a_module_with_hooks_is_called_as_it_is(backbone):
    layer = backbone("llava").layers[1]
    own = type(backbone("llava").stack).__module__
    twin = bare(layer, own)
    assert twin is not layer and isinstance(twin, type(layer))
    assert twin.mlp is not layer.mlp and twin.mlp.up_proj.weight is layer.mlp.up_proj.weight
    handle = layer.mlp.register_forward_hook(lambda *_: None)
    try:
        assert bare(layer, own).mlp is layer.mlp
    finally:
        handle.remove()
    layer.mlp.train()
    try:
        assert bare(layer, own).mlp is layer.mlp
    finally:
        layer.mlp.eval()
