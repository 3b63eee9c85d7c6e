"""One table of changes of a model in use; after each, all who keep something answer as the model.

The backbone, its adapter, an engine, both caches and a guarantee's conditions are made, and used,
before the change. What is held is `model.generate` of the changed model.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable
from types import MethodType
from typing import Any

import families
import pytest
import torch
from families import WORDLESS
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import GenerationConfig
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.engine.generate import generate
from offramp.core.models.as_loaded import as_loaded, exits_digest
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet
from offramp.features.prefix_cache import PrefixCache
from offramp.features.vision_cache import VisionCache
from offramp.serving.core import EngineCore
from offramp.serving.engine_config import EngineConfig
from offramp.serving.request import Request

GREEDY = {"do_sample": False, "suppress_tokens": WORDLESS}
POLICY = ExitPolicy({2: 0.9}, shortlist=True)


class InUse:
    """A model, and all that was made of it and used before the change."""

    def __init__(self) -> None:
        self.model: Any = families.build("llava")
        self.model.generation_config.max_new_tokens = 5
        self.backbone = Backbone(self.model).with_decoding(again=0.01)
        exits = Exits(self.backbone, (2,)).requires_grad_(False)
        self.adapter = Adapter(self.backbone, ExitSet(exits, torch.arange(4, 96, 2)), POLICY)
        self.prefix, self.vision = PrefixCache(), VisionCache()
        sizes = EngineConfig(slots=2, limit=64)
        self.core = EngineCore(self.backbone, self.adapter.exits, POLICY, sizes)
        self.digest = exits_digest(exits)
        self.undo: list[Callable[[], Any]] = []
        self.answers()

    @property
    def inner(self) -> Any:
        return self.model.model.language_model

    @property
    def inputs(self) -> dict[str, Any]:
        dtype = self.inner.norm.weight.dtype
        given = families.KINDS["llava"].inputs(1)
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}

    def answers(self) -> dict[str, Any]:
        """By who answers."""
        adapter, inputs = self.adapter, self.inputs
        caches = {"prefix_cache": self.prefix, "vision_cache": self.vision}
        handle = self.core.add(Request(inputs, mode="full", options=GREEDY))
        self.core.run()
        made = {
            "plan": adapter.generate(inputs, mode="full", **GREEDY),
            "lossless": adapter.generate(inputs, mode="lossless", **GREEDY),
            "backbone": generate(self.backbone, inputs, **GREEDY),
            "caches": generate(self.backbone, inputs, **caches, **GREEDY),
            "engine": handle.result(timeout=0).output,
        }
        return {name: output.sequences.tolist() for name, output in made.items()}

    def own(self) -> Any:
        return self.model.generate(**self.inputs, **GREEDY).tolist()

    def put(self, target: Any, name: str, value: Any) -> None:
        """Set an attribute, until the test is over."""
        before = target.__dict__.get(name, self)
        setattr(target, name, value)
        self.undo.append(
            lambda: delattr(target, name) if before is self else setattr(target, name, before)
        )

    def register(self, table: Any, name: str, value: Any) -> None:
        before = table._global_mapping[name]
        table._global_mapping[name] = value
        self.undo.append(lambda: table._global_mapping.update({name: before}))


@pytest.fixture
def used():
    made = InUse()
    yield made
    for undo in reversed(made.undo):
        undo()


def other(module: Any, factor: float = -1.5) -> Any:
    made = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(factor).add_(0.3 * torch.randn(parameter.shape))
    return made


def scaled(call: Callable[..., Any], factor: float = -1.7) -> Callable[..., Any]:
    """A function whose result, or the first of it, is multiplied."""

    def made(*args: Any, **kw: Any) -> Any:
        out = call(*args, **kw)
        return (out[0] * factor, *out[1:]) if isinstance(out, tuple) else out * factor

    return made


def write(tensor: torch.Tensor, factor: float = -1.5) -> None:
    with torch.no_grad():
        tensor.mul_(factor)


def lora(used: InUse, *targets: str) -> None:
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=64, target_modules=list(targets), init_lora_weights=False)
    inject_adapter_in_model(config, used.model)


def loras(used: InUse) -> list[Any]:
    return [m for m in used.model.modules() if isinstance(m, LoraLayer)]


def on_loras(name: str, *args: Any) -> Callable[[InUse], None]:
    def made(used: InUse) -> None:
        lora(used, "q_proj", "down_proj")
        used.answers()
        for module in loras(used):
            getattr(module, name)(*args)

    return made


def assigned(used: InUse) -> None:
    state = {n: t.flip(0).clone() for n, t in used.inner.layers[1].state_dict().items()}
    used.inner.layers[1].load_state_dict(state, assign=True)


def stacked(used: InUse) -> None:
    """The stack's own code, with its last state turned round."""
    own = LlamaModel.forward

    def forward(self: Any, *args: Any, **kw: Any) -> Any:
        out = own(self, *args, **kw)
        out.last_hidden_state = out.last_hidden_state.flip(-1)
        return out

    forward.__signature__ = __import__("inspect").signature(own)  # type: ignore[attr-defined]
    used.put(LlamaModel, "forward", forward)


def of_class(kind: type, name: str = "forward") -> Callable[[InUse], None]:
    import functools

    def made(used: InUse) -> None:
        own = getattr(kind, name)
        used.put(kind, name, functools.wraps(own)(scaled(own)))

    return made


def of_instance(find: Callable[[InUse], Any]) -> Callable[[InUse], None]:
    def made(used: InUse) -> None:
        module = find(used)
        module.forward = scaled(module.forward)

    return made


def masked(used: InUse) -> None:
    """Each token sees itself and those before it by an even distance."""
    own = AttentionMaskInterface._global_mapping["sdpa"]

    def mask(*args: Any, **kw: Any) -> Any:
        kw["allow_is_causal_skip"] = False
        made = own(*args, **kw)
        if made is None:
            return None
        keys = torch.arange(made.shape[-1])
        return made & ((keys % 2 == 0) | (keys == keys[-1]))

    used.register(AttentionMaskInterface, "sdpa", mask)


def hook(find: Callable[[InUse], Any], before: bool = False) -> Callable[[InUse], None]:
    def made(used: InUse) -> None:
        module = find(used)
        if before:
            module.register_forward_pre_hook(lambda m, args: (args[0] * -2, *args[1:]))
        else:
            module.register_forward_hook(
                lambda m, args, out: (out[0] * -2, *out[1:]) if isinstance(out, tuple) else out * -2
            )

    return made


def hook_on_all(used: InUse) -> None:
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda m, args, out: out * -1.3 if isinstance(m, LlamaMLP) else None
    )
    used.undo.append(handle.remove)


def peft_head(used: InUse) -> None:
    get_peft_model(used.model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        for name, weight in used.model.named_parameters():
            if "modules_to_save" in name:
                weight.copy_(weight.roll(5, 0))
    used.model.requires_grad_(False)


def layer(used: InUse) -> Any:
    return used.inner.layers[1]


def resized(used: InUse) -> None:
    used.model.resize_token_embeddings(families.VOCABULARY)
    write(used.model.get_input_embeddings().weight[4:40])


def in_another_thread(used: InUse) -> None:
    thread = threading.Thread(target=write, args=(layer(used).mlp.down_proj.weight,))
    thread.start()
    thread.join()


def second_backbone(used: InUse) -> None:
    """Another adapter on the same model answers, and then the model changes."""
    Adapter(Backbone(used.model), ExitSet.of(Exits(used.backbone, (3,))), ExitPolicy({3: 0.9}))
    write(used.inner.norm.weight)


def with_config(**values: Any) -> Callable[[InUse], None]:
    def made(used: InUse) -> None:
        values_ = {**used.model.generation_config.to_dict(), **values}
        used.model.generation_config = GenerationConfig.from_dict(values_)

    return made


CHANGES: dict[str, Callable[[InUse], Any]] = {
    "a parameter written": lambda u: write(layer(u).self_attn.q_proj.weight),
    "a parameter replaced": lambda u: setattr(
        layer(u).mlp.up_proj, "weight", nn.Parameter(layer(u).mlp.up_proj.weight.flip(0))
    ),
    "a parameter set": lambda u: layer(u).mlp.up_proj.weight.set_(
        layer(u).mlp.up_proj.weight.flip(0).clone()
    ),
    "parameters loaded": lambda u: layer(u).load_state_dict(u.inner.layers[3].state_dict()),
    "parameters assigned": assigned,
    "another precision and back": lambda u: u.model.to(torch.bfloat16).to(torch.float32),
    "another precision": lambda u: (
        u.model.to(torch.float64),
        u.adapter.exits.modules.to(torch.float64),
    ),
    "rotary frequencies written": lambda u: u.inner.rotary_emb.inv_freq.mul_(0.3),
    "rotary frequencies written twice": lambda u: (
        u.inner.rotary_emb.inv_freq.mul_(0.3),
        u.answers(),
        u.inner.rotary_emb.inv_freq.mul_(3.0),
    ),
    "rotary frequencies replaced": lambda u: setattr(
        u.inner.rotary_emb, "inv_freq", u.inner.rotary_emb.inv_freq * 0.3
    ),
    "the head by its setter": lambda u: u.model.set_output_embeddings(other(u.model.lm_head)),
    "the head by attribute": lambda u: setattr(u.model, "lm_head", other(u.model.lm_head)),
    "the head written": lambda u: write(u.model.lm_head.weight),
    "the head by PEFT": peft_head,
    "LoRA on a projection": lambda u: lora(u, "q_proj"),
    "LoRA on the head": lambda u: lora(u, "lm_head"),
    "LoRA switched off": on_loras("enable_adapters", False),
    "LoRA scaled": on_loras("set_scale", "default", 9.0),
    "LoRA merged": on_loras("merge"),
    "LoRA deleted": on_loras("delete_adapter", "default"),
    "embeddings resized": resized,
    "embeddings replaced": lambda u: u.inner.set_input_embeddings(
        other(u.inner.get_input_embeddings())
    ),
    "the norm replaced": lambda u: setattr(u.inner, "norm", other(u.inner.norm)),
    "a layer replaced": lambda u: u.inner.layers.__setitem__(1, other(layer(u))),
    "the layers replaced": lambda u: setattr(u.inner, "layers", other(u.inner.layers, 0.5)),
    "the stack replaced": lambda u: setattr(u.model.model, "language_model", other(u.inner, 0.7)),
    "the projector replaced": lambda u: setattr(
        u.model.model, "multi_modal_projector", other(u.model.model.multi_modal_projector, 9.0)
    ),
    "the tower replaced": lambda u: setattr(
        u.model.model, "vision_tower", other(u.model.model.vision_tower, 3.0)
    ),
    "the tower written": lambda u: [write(p, 3.0) for p in u.model.model.vision_tower.parameters()],
    "another generation config": with_config(max_new_tokens=9),
    "a generation config that repeats nothing": with_config(repetition_penalty=9.0),
    "the generation config set": lambda u: setattr(u.model.generation_config, "max_new_tokens", 8),
    "another attention": lambda u: u.model.set_attn_implementation("eager"),
    "the attention function replaced": lambda u: u.register(
        ALL_ATTENTION_FUNCTIONS, "sdpa", scaled(ALL_ATTENTION_FUNCTIONS["sdpa"])
    ),
    "the mask function replaced": masked,
    "a function of the file replaced": lambda u: u.put(
        modeling_llama, "rotate_half", scaled(modeling_llama.rotate_half)
    ),
    "a hook behind a layer": hook(layer),
    "a hook before a layer": hook(layer, before=True),
    "a hook behind a part": hook(lambda u: layer(u).mlp.down_proj),
    "a hook behind the rotary tables": hook(lambda u: u.inner.rotary_emb),
    "a hook behind the embeddings": hook(lambda u: u.inner.embed_tokens),
    "a hook behind the head": hook(lambda u: u.model.lm_head),
    "a hook behind the norm": hook(lambda u: u.inner.norm),
    "a hook behind the projector": hook(lambda u: u.model.model.multi_modal_projector),
    "a hook on all modules": hook_on_all,
    "forward of an attention": of_instance(lambda u: layer(u).self_attn),
    "forward of a layer": of_instance(layer),
    "forward of an MLP": of_instance(lambda u: layer(u).mlp),
    "forward of a norm": of_instance(lambda u: u.inner.norm),
    "forward of attentions' class": of_class(LlamaAttention),
    "forward of layers' class": of_class(LlamaDecoderLayer),
    "forward of MLPs' class": of_class(LlamaMLP),
    "forward of norms' class": of_class(LlamaRMSNorm),
    "forward of rotary tables' class": of_class(LlamaRotaryEmbedding),
    "forward of the stack's class": stacked,
    "another class": lambda u: setattr(
        layer(u).mlp, "__class__", type("Mine", (LlamaMLP,), {"forward": scaled(LlamaMLP.forward)})
    ),
    "a number that code reads": lambda u: setattr(u.inner.norm, "variance_epsilon", 5.0),
    "a method of an instance": lambda u: setattr(
        u.model.model,
        "get_placeholder_mask",
        MethodType(type(u.model.model).get_placeholder_mask, u.model.model),
    ),
    "from another thread": in_another_thread,
    "with a second backbone": second_backbone,
}
"""What is done to a model in use."""
SAME_ANSWERS = {
    "another precision and back",
    "another precision",
    "another attention",
    "LoRA deleted",
    "LoRA switched off",
    "a method of an instance",
    "rotary frequencies written twice",
    "another generation config",
    "a generation config that repeats nothing",
    "the generation config set",
}
"""Changes that are none of what a guarantee calls the model's answers, or may not show in a few
tokens."""


@pytest.mark.parametrize("name", CHANGES)
def test_all_answer_as_the_changed_model(used: InUse, name: str) -> None:
    torch.manual_seed(1)
    with contextlib.suppress(Warning):
        CHANGES[name](used)
    expected = used.own()
    assert {who for who, made in used.answers().items() if made != expected} == set()
    if name not in SAME_ANSWERS:
        assert not as_loaded(used.backbone)


EXIT_CHANGES: dict[str, Callable[[Any], Any]] = {
    "written": lambda exit: write(exit.mlp.down_proj.weight),
    "replaced": lambda exit: setattr(
        exit.mlp.down_proj, "weight", nn.Parameter(exit.mlp.down_proj.weight.flip(0))
    ),
    "loaded": lambda exit: exit.load_state_dict(
        {n: t.flip(0).clone() for n, t in exit.state_dict().items()}, assign=True
    ),
    "set": lambda exit: exit.mlp.down_proj.weight.set_(exit.mlp.down_proj.weight.flip(0).clone()),
}


@pytest.mark.parametrize("name", EXIT_CHANGES)
def test_the_digest_of_exits_sees_each_change(used: InUse, name: str) -> None:
    plan = used.adapter.plan()
    EXIT_CHANGES[name](used.adapter.exits.at(2))
    assert exits_digest(used.adapter.exits.modules) != used.digest
    assert used.adapter.plan() is not plan


def test_what_changes_nothing_ends_no_plan(used: InUse) -> None:
    plan = used.adapter.plan()
    for _ in range(2):
        used.own()
        used.answers()
        assert used.adapter.plan() is plan and as_loaded(used.backbone)
    assert exits_digest(used.adapter.exits.modules) == used.digest
    assert isinstance(used.model, LlavaForConditionalGeneration)


def test_a_patch_after_an_answer_is_read_by_models_that_are_loaded_later(used: InUse) -> None:
    used.put(LlamaMLP, "forward", scaled(LlamaMLP.forward))
    later = InUse()
    assert set(map(str, later.answers().values())) == {str(later.own())}
