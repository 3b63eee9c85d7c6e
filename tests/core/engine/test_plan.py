"""Laws of the plan: it is made once and kept, and never outlives what it was made of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any

import families
import pytest
import torch
from families import WORDLESS
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from transformers import NemotronConfig, NemotronForCausalLM

from offramp.adapter.adapter import Adapter
from offramp.core.decoding import plan as plan_module
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.engine.generate import generate
from offramp.core.engine.plan import PLANS
from offramp.core.errors import InputError
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet
from offramp.serving.core import EngineCore
from offramp.serving.engine_config import EngineConfig
from offramp.serving.request import Request

NAME = "llava"
GREEDY = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": WORDLESS}
POLICY = ExitPolicy({2: 0.03}, shortlist=True)
SHORT = torch.arange(4, 96, 2)


def fresh() -> Adapter:
    """An adapter of its own, some of whose tokens exit."""
    backbone = Backbone(families.build(NAME))
    exits = Exits(backbone, (2,)).requires_grad_(False)
    families.perturb(exits)
    return Adapter(backbone, ExitSet(exits, SHORT), POLICY)


def layer(adapter: Adapter) -> Any:
    return adapter.backbone.layers[1]


def projection(adapter: Adapter) -> torch.nn.Linear:
    found: torch.nn.Linear = layer(adapter).self_attn.q_proj
    return found


def replaced(adapter: Adapter) -> None:
    weight = projection(adapter).weight
    projection(adapter).weight = torch.nn.Parameter(weight.flip(0).clone(), requires_grad=False)


def written(adapter: Adapter) -> None:
    with torch.no_grad():
        projection(adapter).weight.mul_(-1.5)


def module_replaced(adapter: Adapter) -> None:
    other = copy.deepcopy(projection(adapter))
    with torch.no_grad():
        other.weight.mul_(-1.0)
    layer(adapter).self_attn.q_proj = other


def head_written(adapter: Adapter) -> None:
    with torch.no_grad():
        adapter.backbone.head.weight.copy_(adapter.backbone.head.weight.roll(2, 0))


def exit_written(adapter: Adapter) -> None:
    with torch.no_grad():
        for parameter in adapter.exits.modules.parameters():
            parameter.mul_(1.7)


def hooked(adapter: Adapter) -> None:
    layer(adapter).mlp.register_forward_hook(lambda module, args, out: -3 * out)


def hooked_deep(adapter: Adapter) -> None:
    projection(adapter).register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def converted(adapter: Adapter) -> None:
    adapter.backbone.model.to(torch.bfloat16)
    adapter.exits.modules.to(torch.bfloat16)


def attention(adapter: Adapter) -> None:
    adapter.backbone.model.set_attn_implementation("eager")


def with_lora(adapter: Adapter) -> None:
    torch.default_generator.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj"], init_lora_weights=False)
    inject_adapter_in_model(config, adapter.backbone.model.model.language_model)


def lora_layers(adapter: Adapter) -> list[LoraLayer]:
    return [m for m in adapter.backbone.model.modules() if isinstance(m, LoraLayer)]


def lora_off(adapter: Adapter) -> None:
    for module in lora_layers(adapter):
        module.enable_adapters(False)


def lora_merged(adapter: Adapter) -> None:
    for module in lora_layers(adapter):
        module.merge()


def lora_scaled(adapter: Adapter) -> None:
    for module in lora_layers(adapter):
        module.set_scale("default", 6.0)


def lora_switched(adapter: Adapter) -> None:
    config = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj"], init_lora_weights=False)
    torch.default_generator.manual_seed(4)
    inner = adapter.backbone.model.model.language_model
    inject_adapter_in_model(config, inner, adapter_name="other")
    for module in lora_layers(adapter):
        module.set_adapter("other")


def lora_deleted(adapter: Adapter) -> None:
    for module in lora_layers(adapter):
        module.delete_adapter("default")


def unhooked(adapter: Adapter) -> None:
    layer(adapter).mlp._forward_hooks.popitem()


def buffer_written(adapter: Adapter) -> None:
    adapter.backbone.stack.rotary_emb.inv_freq.mul_(0.5)


def embeddings_written(adapter: Adapter) -> None:
    with torch.no_grad():
        table = adapter.backbone.stack.get_input_embeddings().weight
        table.copy_(table.roll(3, 0))


def training(adapter: Adapter) -> None:
    layer(adapter).train()


CHANGES: dict[str, tuple[Callable[[Adapter], None], ...]] = {
    "a parameter replaced": (replaced,),
    "a parameter written in place": (written,),
    "a module replaced": (module_replaced,),
    "the head written in place": (head_written,),
    "the exits written in place": (exit_written,),
    "a hook on a part of a layer": (hooked,),
    "a hook deep inside": (hooked_deep,),
    "another precision": (converted,),
    "another attention": (attention,),
    "LoRA put in": (with_lora,),
    "LoRA switched off": (with_lora, lora_off),
    "LoRA merged": (with_lora, lora_merged),
    "LoRA scaled": (with_lora, lora_scaled),
    "LoRA switched to another": (with_lora, lora_switched),
    "LoRA deleted": (with_lora, lora_deleted),
    "a hook taken off": (hooked, unhooked),
    "a buffer written in place": (buffer_written,),
    "embeddings written in place": (embeddings_written,),
    "a layer set to train": (training,),
}


NO_OTHER_ANSWERS = (
    "another attention",
    "another precision",
    "LoRA switched off",
    "LoRA deleted",
    "a hook taken off",
    "a layer set to train",
)


def inputs_of(dtype: torch.dtype) -> dict[str, Any]:
    given = families.KINDS[NAME].inputs(1)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}


def answers(adapter: Adapter) -> list[Any]:
    given = inputs_of(adapter.backbone.dtype)
    modes = ("full", "early_exit", "lossless")
    return [adapter.generate(given, mode=mode, **GREEDY).sequences.tolist() for mode in modes]


@cache
def always(*changes: Callable[[Adapter], None]) -> list[Any]:
    """What an adapter answers to which the changes were made before it was asked."""
    adapter = fresh()
    for change in changes:
        change(adapter)
    return answers(adapter)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_ends_the_plan_and_answers_are_those_of_a_model_that_always_was_so(
    name: str,
) -> None:
    adapter = fresh()
    for change in CHANGES[name]:
        answers(adapter)
        plan = adapter.plan()
        change(adapter)
        assert adapter.plan() is not plan
    assert answers(adapter) == always(*CHANGES[name])
    assert name in NO_OTHER_ANSWERS or always(*CHANGES[name]) != always()


@pytest.mark.parametrize("name", CHANGES)
def test_a_live_engine_seats_no_prompt_by_a_stale_plan(name: str) -> None:
    """What is being written ends first; what comes after the change is the changed model's."""
    adapter = fresh()
    core = EngineCore(adapter.backbone, adapter.exits, POLICY, EngineConfig(slots=2, limit=64))
    for change in CHANGES[name]:
        before = core.add(Request(inputs_of(adapter.backbone.dtype), options=GREEDY))
        if change is converted:  # the keys of what is being written are of the old precision
            core.run()
        core.round()
        core.round()
        change(adapter)
    late = core.add(Request(inputs_of(adapter.backbone.dtype), options=GREEDY))
    core.run()
    assert before.done() and late.exception() is None
    assert late.result().output.sequences.tolist() == always(*CHANGES[name])[1]


def test_a_plan_is_kept_while_nothing_changes() -> None:
    adapter = fresh()
    answers(adapter)
    plan = adapter.plan()
    answers(adapter)
    assert adapter.plan() is plan and adapter.plan(POLICY) is plan
    for threshold in range(PLANS):
        adapter.plan(ExitPolicy({2: threshold / 10}))
    assert adapter.plan() is not plan  # older ones are forgotten


def test_a_kept_executor_answers_as_a_new_one_and_holds_no_memory() -> None:
    """Whatever the answer before: longer, of several rows, or ended by an error."""
    adapter = fresh()
    expected, given = answers(adapter), inputs_of(adapter.backbone.dtype)
    plan = adapter.plan(POLICY)
    with plan.running(slots=1, own_frequencies=False) as kept:
        pass
    adapter.generate(given, max_new_tokens=200, do_sample=False, suppress_tokens=WORDLESS)
    adapter.generate(families.KINDS[NAME].inputs(3), **GREEDY)
    assert kept.cache.nbytes == 0 and kept.cache.columns < 200
    assert answers(adapter) == expected

    def stops(ids: Any, logits: Any) -> Any:
        raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        adapter.generate(given, logits_processor=[stops], **GREEDY)
    assert answers(adapter) == expected
    with plan.running(slots=1, own_frequencies=False) as another:
        assert another is not kept  # after an error none is kept


def test_a_hook_on_all_modules_ends_the_plan() -> None:
    adapter = fresh()
    answers(adapter)
    plan, seen = adapter.plan(POLICY), []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(module)
    )
    try:
        assert adapter.plan(POLICY) is not plan
        answers(adapter)
    finally:
        handle.remove()
    assert projection(adapter) in seen


def test_one_decoder_is_built_by_one_site(monkeypatch: pytest.MonkeyPatch) -> None:
    """Single answers, batches and the self-check go through `Plan.decoder`."""
    made = []
    build = plan_module.Decoder

    def noted(*args: Any, **kw: Any) -> Any:
        made.append(args)
        return build(*args, **kw)

    monkeypatch.setattr(plan_module, "Decoder", noted)
    adapter = fresh()
    answers(adapter)
    assert len(made) == 3
    EngineCore(adapter.backbone, adapter.exits, POLICY, EngineConfig(slots=2, limit=64))
    assert len(made) == 4


def test_threads_share_a_plan() -> None:
    adapter = fresh()
    expected = answers(adapter)
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(answers, adapter) for _ in range(4)]
        assert all(each.result() == expected for each in found)


def test_the_answer_that_a_backbone_is_checked_on_is_that_of_later_ones() -> None:
    """What watching finds makes no promise for first tokens."""
    torch.manual_seed(0)
    config = NemotronConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    fresh = Backbone.of(NemotronForCausalLM(config).eval())
    fresh.family = replace(fresh.family, discovered=True, causal_prompt=False)
    ids = torch.tensor([[1, 5, 9, 3]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    policy, exits = ExitPolicy({2: 0.01}), Exits(fresh, (2,))
    first, second = (
        generate(
            fresh,
            inputs,
            exits=exits,
            policy=policy,
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=None,
        )
        for _ in range(2)
    )
    assert (fresh.readings.read, fresh.readings.failed) == (1, 0)
    assert first.depths.tolist() == second.depths.tolist()
    assert torch.equal(first.sequences, second.sequences)


def test_exits_that_stay_behind_in_another_precision_are_told() -> None:
    adapter, inputs = fresh(), families.KINDS[NAME].inputs(1)
    adapter.backbone.model.double()
    wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    with pytest.raises(InputError, match="float64") as caught:
        adapter.generate(wide, **GREEDY)
    assert len(str(caught.value).splitlines()) == 2
    adapter.exits.modules.to(torch.float64)
    assert adapter.generate(wide, **GREEDY).layers == adapter.backbone.depth
