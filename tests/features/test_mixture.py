"""An exit beside a mixture of experts may have one MLP in their place."""

from __future__ import annotations

import pytest
import torch
import zoo

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.engine.generate import generate
from offramp.core.executors.kv_cache import add_exit_entries
from offramp.core.executors.prefill import Prefill, prepare
from offramp.core.models.backbone import Backbone
from offramp.core.models.exit_kinds import EXIT_KINDS
from offramp.core.models.exits import Exits, copied_index
from offramp.core.models.intercept import InterceptedModel
from offramp.features.mixture import DenseBlock, dense_exit, expert_blocks
from offramp.features.registration import register_exit

DEPTH = 2


def weights(module):
    return sum(parameter.numel() for parameter in module.parameters())


class RunsTheExit:
    """Runs every layer, and the exit beside one."""

    def __init__(self, exits):
        self.exits, self.made = exits, None

    def layer(self, call):
        if call.index == DEPTH:
            self.made = self.exits.run(DEPTH, call)
        return call.run(call.layer)


@pytest.mark.parametrize("name", ["aria", "glm4v_moe", "qwen3_vl_moe", "qwen3_5_moe"])
def test_experts_give_way_to_one_mlp_that_learns(name, tmp_path):
    model = zoo.build(name)
    inputs = zoo.inputs(name, model, 1)
    whole = Backbone(model, example=inputs)
    layer = whole.layers[copied_index(whole, DEPTH)]
    assert expert_blocks(layer)
    exits = Exits(whole, (DEPTH,), kind="dense")
    assert weights(exits) < weights(layer) and not expert_blocks(exits.at(DEPTH))
    (block,) = (part for part in exits.modules() if isinstance(part, DenseBlock))
    torch.nn.init.normal_(block.down.weight)  # before it has learnt, nothing reaches the others
    handler = RunsTheExit(exits)
    intercepted = InterceptedModel(whole, handler)
    with torch.no_grad():
        prepared = prepare(intercepted.model, inputs, max_new_tokens=1)
        add_exit_entries(prepared.cache, exits.entries, whole.depth)
    Prefill(intercepted, prepared)
    handler.made.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())
    exits.requires_grad_(False)
    policy = ExitPolicy({DEPTH: 0.0})
    made = generate(whole, inputs, exits=exits, policy=policy, max_new_tokens=4)
    assert (made.depths[:, 1:] == DEPTH).all()
    Adapter(whole, exits, policy).save(tmp_path)
    assert Adapter.load(tmp_path, whole).exits.modules.kind == "dense"


def test_its_width_may_be_stated(monkeypatch):
    monkeypatch.setitem(EXIT_KINDS, "narrow", EXIT_KINDS["dense"])
    register_exit("narrow", dense_exit(width=5))
    exits = Exits(Backbone(zoo.build("qwen3_vl_moe")), (DEPTH,), kind="narrow")
    (block,) = (part for part in exits.modules() if isinstance(part, DenseBlock))
    assert block.up.out_features == 5


def test_before_training_it_adds_nothing_and_elsewhere_it_is_a_copy():
    states = torch.randn(1, 2, 8)
    assert not DenseBlock(8, 16, 0)(states).any()
    assert DenseBlock(8, 16, 2)(states)[1] is None
    whole = Backbone(zoo.build("aya_vision"))
    dense, copy = Exits(whole, (DEPTH,), kind="dense"), Exits(whole, (DEPTH,))
    assert all(map(torch.equal, dense.parameters(), copy.parameters()))
