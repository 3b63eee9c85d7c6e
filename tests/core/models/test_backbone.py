"""Laws of the backbone: without exits the loop is HF's `generate`; the model stays as it was."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from decoding import NEW, greedy
from families import NAMES
from transformers import (
    CLIPVisionConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
)

from offramp.core.decoding.policy import ExitPolicy
from offramp.core.engine.generate import generate
from offramp.core.errors import InputError, UnsupportedBackboneError
from offramp.core.models import registry
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits
from offramp.core.models.fingerprint import fingerprint, same_backbone
from offramp.core.models.intercept import InterceptedModel
from offramp.core.models.registry import Family, register_backbone
from offramp.features.self_check import check_decoding

# -- the model is left as it was found --------------------------------------------------------


def portrait(model):
    """Everything about a model that patching it would change."""
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [
        (
            path,
            id(part),
            type(part),
            "forward" in vars(part),
            [id(child) for child in part._modules.values()],
            [list(getattr(part, table)) for table in tables],
        )
        for path, part in model.named_modules()
    ]


def wrapped(text: Any) -> Any:
    """A LLaVA around a decoder."""
    tower = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower), text_config=text, image_token_index=95
    )
    return LlavaForConditionalGeneration(config).eval()


SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def test_a_wrapper_that_is_tested_vouches_for_no_decoder_that_is_not() -> None:
    """Llama 4's layers see chunks of a prompt and have frequencies of their own: it was driven as a
    LLaMA is, unchecked."""
    torch.manual_seed(0)
    plain = Backbone(wrapped(LlamaConfig(**SIZES)))
    assert plain.tested
    more = {"intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 8}
    for text in (Llama4TextConfig(**SIZES, **more), MistralConfig(**SIZES)):
        backbone = Backbone(wrapped(text))
        assert not backbone.tested and backbone.engine is None
        ids = torch.randint(0, 90, (1, 20))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        how = {"max_new_tokens": 12, "do_sample": False}
        own = backbone.model.generate(**inputs, **how)
        try:
            found = generate(backbone, inputs, **how).sequences
        except UnsupportedBackboneError:  # in words, and before an answer
            continue
        assert torch.equal(found, own)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_left_as_it_was_found(name, batch):
    model = families.build(name)
    inputs = batch(name, 4)
    out = greedy(model, inputs)  # first: HF hangs lasting recorders on the vision tower here
    before, keys = portrait(model), list(model.state_dict())
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    whole = Backbone(model)
    depths = families.depths(name)
    policy = ExitPolicy(dict.fromkeys(depths, 0.5))
    generate(whole, inputs, exits=Exits(whole, depths), policy=policy, max_new_tokens=NEW)
    assert portrait(model) == before
    assert list(model.state_dict()) == keys
    assert all(torch.equal(model.state_dict()[key], weights[key]) for key in keys)
    assert torch.equal(greedy(model, inputs), out)


class Watcher:
    """A streamer that looks at the model between two tokens."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def put(self, value):
        self.seen.append(portrait(self.model))

    def end(self):
        pass


@pytest.mark.parametrize("name", ["blip2-t5", "llava", "gemma3"])
def test_the_model_is_not_patched_even_while_generating(name, batch):
    whole = Backbone(families.build(name))
    greedy(whole.model, batch(name, 1))
    before = portrait(whole.model)
    watcher = Watcher(whole.model)
    generate(whole, batch(name, 1), max_new_tokens=3, streamer=watcher)
    assert watcher.seen == [before] * 4


@pytest.mark.parametrize("name", NAMES)
def test_generations_do_not_pile_up_recorders(name, batch):
    """HF hangs hooks on a model whose config asks for hidden states; once, not every time."""
    whole = Backbone(families.build(name))
    for part in whole.model.modules():
        if hasattr(part, "config"):
            part.config.output_hidden_states = True
    inputs = batch(name, 1)
    generate(whole, inputs, max_new_tokens=2)
    before = portrait(whole.model)
    generate(whole, inputs, max_new_tokens=2)
    assert portrait(whole.model) == before


def test_a_hook_on_a_view_does_not_show_on_the_model(batch):
    whole = Backbone(families.build("llava"))
    intercepted = InterceptedModel(whole, None)
    intercepted.stack.register_forward_hook(lambda *_: None)
    intercepted.stack.register_forward_pre_hook(lambda *_: None)
    assert not whole.stack._forward_hooks and not whole.stack._forward_pre_hooks


def test_a_generation_that_fails_leaves_the_model_as_it_was(batch):
    whole = Backbone(families.build("llava"))
    greedy(whole.model, batch("llava", 1))
    before = portrait(whole.model)

    def fail(ids, scores):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        generate(whole, batch("llava", 1), logits_processor=[fail], max_new_tokens=3)
    assert portrait(whole.model) == before


@pytest.mark.parametrize("name", NAMES)
def test_a_backbone_is_frozen(name, backbone):
    model = backbone(name).model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(part.training for part in model.modules())


# -- which models -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_layers_found_are_the_text_decoders(name, backbone):
    whole = backbone(name)
    assert whole.depth == (8 if name == "gemma3" else families.LAYERS)
    assert whole.width == families.WIDTH
    assert whole.vocabulary == families.VOCABULARY
    assert whole.is_encoder_decoder == (name in ("blip2-t5", "instructblip-t5", "florence2"))


def unknown_model(model_type="my_vlm"):
    from transformers import LlavaConfig

    model = families.build("llava")
    config = type("MyConfig", (LlavaConfig,), {"model_type": model_type})
    model.config.__class__ = config
    return model


def test_an_unknown_family_is_found_by_watching(batch):
    whole = Backbone(unknown_model())
    assert whole.family.discovered and whole.family.stack == "model.language_model"
    ours = generate(whole, batch("llava", 4), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(ours.sequences, greedy(whole.model, batch("llava", 4)))


def test_an_unknown_text_model_inside_a_known_wrapper_is_found(monkeypatch, batch):
    monkeypatch.delitem(registry.TEXT_FAMILIES, "opt")
    whole = Backbone(families.build("blip2-opt"), example=batch("blip2-opt", 1))
    assert whole.family.stack == "language_model.model.decoder"
    with pytest.raises(UnsupportedBackboneError, match="example=inputs") as caught:
        Backbone(families.build("blip2-opt"))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("kind", ["gpt_neox", "gemma2"])
def test_another_text_model_in_a_known_wrapper_is_read_as_it_is(kind, batch):
    """GPT-NeoX calls its norm otherwise; LLaVA leaves out the soft cap of Gemma 2's logits."""
    from transformers import CONFIG_MAPPING, LlavaForConditionalGeneration

    config = families.build("llava").config
    sizes = config.text_config.to_dict() | {"head_dim": 8}
    config.text_config = CONFIG_MAPPING[kind](
        **{
            name: sizes[name]
            for name in (
                "hidden_size",
                "vocab_size",
                "num_hidden_layers",
                "num_attention_heads",
                "intermediate_size",
                "head_dim",
            )
        },
        num_key_value_heads=2,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    found = check_decoding(Backbone(model), batch("llava", 1), depths=(2, 4))
    assert all(map(found.holds, (found.plain, found.exits, found.lossless))), found


def test_a_registered_family_works(monkeypatch, batch):
    monkeypatch.setattr(registry, "FAMILIES", dict(registry.FAMILIES))
    register_backbone("my_vlm", Family("model.language_model"))
    model = unknown_model()
    inputs = batch("llava", 4)
    ours = generate(Backbone(model), inputs, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(ours.sequences, greedy(model, inputs))


@pytest.mark.parametrize("path", ["model.language", "nothing.language_model"])
def test_a_wrong_path_is_named(monkeypatch, path):
    monkeypatch.setattr(registry, "FAMILIES", {**registry.FAMILIES, "llava": Family(path)})
    with pytest.raises(UnsupportedBackboneError, match=path) as caught:
        Backbone(families.build("llava"))
    assert "register_backbone" in str(caught.value)


def test_a_path_to_something_else_than_a_stack_is_refused(monkeypatch):
    wrong = Family("model.language_model", layers="norm")
    monkeypatch.setattr(registry, "FAMILIES", {**registry.FAMILIES, "llava": wrong})
    with pytest.raises(UnsupportedBackboneError, match="not a list"):
        Backbone(families.build("llava"))


def test_an_opt_that_projects_its_output_is_refused():
    model = families.blip2(families.opt_config(word_embed_proj_dim=16))
    with pytest.raises(UnsupportedBackboneError, match="opt-350m"):
        Backbone(model)


@pytest.mark.parametrize("path", ["", "model", "model.language_model"])
def test_offloading_hooks_are_refused(path):
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = families.build("llava")
    add_hook_to_module(model.get_submodule(path), ModelHook())
    with pytest.raises(UnsupportedBackboneError, match="device_map"):
        Backbone(model)


def test_a_prompt_learning_adapter_is_refused():
    from peft import PromptTuningConfig, get_peft_model

    model = families.build("blip2-opt").language_model
    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UnsupportedBackboneError, match="prompt-learning"):
        Backbone(tuned)


# -- loading and fingerprints -----------------------------------------------------------------


def test_no_such_model_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="save_pretrained"):
        Backbone.from_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["blip2-opt", "llava", "florence2"])
def test_a_reloaded_backbone_has_the_same_fingerprint_and_is_frozen(name, tmp_path, backbone):
    backbone(name).model.save_pretrained(tmp_path)
    again = Backbone.from_pretrained(tmp_path)
    assert fingerprint(again) == fingerprint(backbone(name))
    assert not any(parameter.requires_grad for parameter in again.model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_another_precision_is_the_same_backbone(name, backbone):
    half = fingerprint(backbone(name, torch.bfloat16))
    assert same_backbone(fingerprint(backbone(name)), half) is None


@pytest.mark.parametrize("name", NAMES)
def test_another_seed_is_another_backbone(name, backbone):
    other = fingerprint(Backbone(families.build(name, seed=1)))
    assert "differ" in (same_backbone(fingerprint(backbone(name)), other) or "")


def test_another_family_is_another_backbone_in_words(backbone):
    one, other = fingerprint(backbone("llava")), fingerprint(backbone("internvl"))
    assert same_backbone(one, other) == "model_type is internvl, not llava"
