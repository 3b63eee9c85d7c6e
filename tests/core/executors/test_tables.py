"""Laws of decoding without the stack's own code: every token as with it, and less of it run."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import families
import pytest
import torch
from decoding import always
from families import NAMES
from reference import Dice

from offramp.core.decoding.policy import FULL, ExitPolicy
from offramp.core.engine.generate import generate
from offramp.core.executors.bare import bare
from offramp.core.executors.slots import cache, tables
from offramp.core.executors.slots.executor import SlotExecutor
from offramp.core.models.backbone import Backbone
from offramp.serving.core import EngineCore
from offramp.serving.engine_config import EngineConfig
from offramp.serving.request import Request

GREEDY = {"max_new_tokens": 10, "do_sample": False}


@pytest.fixture
def both(monkeypatch, scored):
    """What the model's own stack makes of a request, and what its layers alone make in slots."""
    used: list[bool] = []
    run_layers = SlotExecutor._by_layers

    def noted(self, *args):
        used.append(True)
        return run_layers(self, *args)

    monkeypatch.setattr(SlotExecutor, "_by_layers", noted)

    def run(whole, inputs, *, dice=None, lean=True, **given):
        made: list[Any] = []
        for engine in ("stack", "slots"):
            used.clear()
            monkeypatch.setattr(whole, "engine", engine)
            if dice is not None:
                scored(Dice(dice))
            made.append(generate(whole, inputs, **{**GREEDY, **given}))
        assert bool(used) is lean
        return made

    return run


def same(theirs, ours):
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(ours.depths, theirs.depths)
    torch.testing.assert_close(ours.scores, theirs.scores, equal_nan=True, atol=1e-5, rtol=0)
    return ours


@pytest.mark.parametrize("name", NAMES)
def test_tokens_depths_and_scores_are_the_stacks(name, backbone, exits, batch, both):
    whole, parts, inputs = backbone(name), exits(name), batch(name, 1)
    first, second = parts.depths
    given = {"exits": parts}
    same(*both(whole, inputs, policy=FULL))
    same(*both(whole, inputs, policy=always(name), **given))
    drafts = ExitPolicy({first: 0.4}, lossless=True)
    assert same(*both(whole, inputs, policy=drafts, dice=5, **given)).rounds
    early = ExitPolicy({first: 0.6})
    same(*both(whole, inputs, policy=early, dice=5, **given))
    rule = ExitPolicy({first: 0.4, second: 0.5})
    mixed = same(*both(whole, inputs, policy=rule, dice=5, **given))
    assert len(mixed.depths.unique()) == 3


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "gemma3", "llava", "florence2"])
def test_rows_that_end_and_padding_are_the_stacks(name, backbone, batch, both):
    whole, inputs = backbone(name), batch(name, 4)
    free = generate(whole, inputs, **GREEDY).new_tokens
    late = [int(row[3]) for row in free if row[3] not in free[:, :2]]
    end = late[0] if late else families.EOS
    same(*both(whole, inputs, eos_token_id=end, pad_token_id=families.PAD))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "gemma3", "paligemma2", "qwen2.5-vl"])
def test_tables_and_slots_grow_with_the_answer(name, backbone, exits, batch, both, monkeypatch):
    """With rollback and catch-up across the ends of what there was room for."""
    monkeypatch.setattr(cache, "BUCKET", 4)
    whole, inputs, first = backbone(name), batch(name, 1), exits(name).depths[0]
    for rule in (ExitPolicy({first: 0.3}, lossless=True), ExitPolicy({first: 0.3})):
        same(*both(whole, inputs, exits=exits(name), policy=rule, dice=3, max_new_tokens=30))


def test_many_rows_and_the_last_positions_are_the_stacks(batch, both):
    whole, inputs = Backbone(families.build("blip2-opt")), batch("blip2-opt", 1)
    sampled = {"do_sample": True, "top_k": 1, "num_return_sequences": 60, "max_new_tokens": 3}
    same(*both(whole, inputs, **sampled))
    room = whole.positions - inputs["input_ids"].shape[1]
    same(*both(whole, inputs, max_new_tokens=room + 1))


def test_tables_serve_every_executor_of_a_backbone(batch, both):
    """A later executor's calls of another kind are held to its own stack, not to the first's."""
    whole = Backbone(families.build("florence2"))
    for rows in (1, 4):
        same(*both(whole, batch("florence2", rows)))


def test_tables_reach_to_the_row_whose_positions_are_the_largest(batch):
    """An image takes fewer positions than columns here, and comes last."""
    name = "qwen2.5-vl"
    whole, image = Backbone(families.build(name)), families.one_row(name, batch(name, 1), 0)
    ids = torch.arange(312)[None] % 50 + families.FIRST_WORD
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    engine = EngineCore(whole, config=EngineConfig(slots=2, limit=400, budget=1000))
    options = {**GREEDY, "suppress_tokens": families.WORDLESS}
    handles = [engine.add(Request(each, options=options)) for each in (text, image)]
    engine.run()
    for handle, inputs in zip(handles, (text, image), strict=True):
        alone = generate(Backbone(families.build(name)), inputs, **options)
        assert torch.equal(handle.result(timeout=0).output.sequences, alone.sequences)


def test_tables_keep_no_backbone_in_memory(batch):
    whole = Backbone(families.build("florence2"))
    generate(whole, batch("florence2", 1), **GREEDY)
    gone = weakref.ref(whole)
    del whole
    gc.collect()
    assert gone() is None


def test_the_stacks_own_code_runs_for_the_prompt_and_for_rehearsals_alone(batch):
    whole, calls = Backbone(families.build("llava")), []
    whole.stack.rotary_emb.register_forward_hook(lambda *_: calls.append(1))
    generate(whole, batch("llava", 1), max_new_tokens=40, do_sample=False)
    first = len(calls)
    assert first <= 6  # the prompt, a rehearsal, and what it is held to, once for a backbone
    generate(whole, batch("llava", 1), max_new_tokens=40, do_sample=False)
    assert len(calls) == first + 1


def test_what_is_made_otherwise_is_left_to_the_stack(batch, both, monkeypatch):
    monkeypatch.setattr(tables, "_of_tables", lambda pair, _: pair[::-1])
    same(*both(Backbone(families.build("llava")), batch("llava", 1), lean=False))


def test_a_switch_leaves_every_token_to_the_stack(batch, both):
    whole = Backbone(families.build("llava")).with_decoding(lean=False)
    same(*both(whole, batch("llava", 1), lean=False))


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


@pytest.mark.skipif(not torch._C.has_mkl, reason="another library multiplies here")
@pytest.mark.parametrize("shape", [(1, 2), (3,), (2, 4)])
def test_several_tokens_have_a_product_of_ours_and_one_has_its_own(shape, monkeypatch):
    made, linear = [], torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, *by: (made.append(x.shape), linear(x, *by))[1]
    )
    states, one = torch.randn(*shape, 256), torch.randn(1, 1, 256)
    for module in (torch.nn.Linear(256, 512), torch.nn.Linear(256, 512, bias=False)):
        ours = bare(module.eval(), "")
        with torch.inference_mode():
            torch.testing.assert_close(ours(states), module(states))
            assert made == [states.shape]  # the module's own
            assert torch.equal(ours(one), module(one))
            bare(module, "", own=False)(states)
        ours(states).sum().backward()  # ours cannot be differentiated
        assert module.weight.grad is not None
        assert made[1:] == [one.shape, one.shape, states.shape, states.shape]
        made.clear()
    small = torch.nn.Linear(64, 64).eval()
    assert type(bare(small, "")).forward is torch.nn.Linear.forward
