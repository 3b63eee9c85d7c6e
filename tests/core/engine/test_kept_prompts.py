"""Laws of prompts that are kept: of this backbone as it is now, at these positions, and whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import families
import pytest
import torch
from families import one_row
from torch import nn

from offramp.core.decoding.policy import ExitPolicy
from offramp.core.engine.generate import generate
from offramp.core.models.backbone import Backbone
from offramp.core.models.change import state_of
from offramp.core.models.exits import Exits
from offramp.features.prefix_cache import PrefixCache, _Kept
from offramp.features.vision_cache import VisionCache

GREEDY = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": families.WORDLESS}


def kept(backbone: Backbone, embeds: torch.Tensor, positions: Any = None) -> _Kept:
    layer = torch.zeros(1, 1, len(embeds), 1)
    return _Kept(weights(backbone), embeds, positions, [(layer, layer)], [], None)


def weights(backbone: Backbone) -> dict[nn.Module, list[Any]]:
    return {backbone.stack: state_of(backbone.stack)}


def test_a_prompt_of_another_backbone_is_not_taken(backbone: Callable[..., Any]) -> None:
    ours, other = backbone("llava"), Backbone(families.build("llava"))
    cache, embeds = PrefixCache(), torch.randn(6, ours.width)
    cache.keep(kept(ours, embeds))
    assert cache.best(weights(ours), embeds, None)[1] == 5
    assert cache.best(weights(other), embeds, None) == (None, 0, 0)
    assert cache.best(weights(ours), embeds, None)[1] == 5


def test_a_prompt_is_not_taken_once_an_exit_that_attended_has_changed(
    backbone: Callable[..., Any],
) -> None:
    """The stack has not: the exit's keys alone are other ones."""
    ours, attended = backbone("llava"), nn.Linear(2, 2)
    cache, embeds, layer = PrefixCache(), torch.randn(6, ours.width), torch.zeros(1, 1, 6, 1)
    pairs, first = [(layer, layer)], {**weights(ours), attended: state_of(attended)}
    cache.keep(_Kept(first, embeds, None, pairs, [(attended, pairs[0])], None))
    assert cache.best(first, embeds, None)[1] == 5
    in_place(attended)
    now = {**weights(ours), attended: state_of(attended)}
    assert cache.best(now, embeds, None) == (None, 0, 0)


def test_being_looked_at_keeps_no_prompt(backbone: Callable[..., Any]) -> None:
    """The one that was not taken for longest goes, however many were compared with another."""
    ours, cache = backbone("llava"), PrefixCache(2)
    used, unused, other, last = torch.randn(4, 6, ours.width)
    cache.keep(kept(ours, used))
    cache.keep(kept(ours, unused))
    assert cache.best(weights(ours), used, None)[1] == 5
    assert cache.best(weights(ours), other, None)[1] == 0
    cache.keep(kept(ours, last))
    assert cache.best(weights(ours), used, None)[1] == 5
    assert cache.best(weights(ours), unused, None)[0] is None


def test_a_prompt_is_taken_as_far_as_its_positions_are_the_same(
    backbone: Callable[..., Any],
) -> None:
    """Two pictures of one colour have one embedding in every place, and rows of other lengths."""
    ours = backbone("qwen2.5-vl")
    cache, embeds = PrefixCache(), torch.randn(6, ours.width)
    positions = torch.arange(6).expand(3, 1, 6).clone()
    cache.keep(kept(ours, embeds, positions))
    assert cache.best(weights(ours), embeds, positions)[1] == 5
    assert cache.best(weights(ours), embeds[:5], positions[..., :5])[1] == 4
    elsewhere = positions.clone()
    elsewhere[1, 0, 3] = 7
    assert cache.best(weights(ours), embeds, elsewhere)[1] == 3
    assert cache.best(weights(ours), embeds, positions + 1) == (None, 0, 0)
    assert cache.best(weights(ours), embeds, positions[0]) == (None, 0, 0)
    assert cache.best(weights(ours), embeds, None) == (None, 0, 0)


def test_positions_that_the_caller_gives_decide_what_is_taken(batch: Callable[..., Any]) -> None:
    model, cache = Backbone(families.build("llava")), PrefixCache()
    text = {"input_ids": torch.arange(10, 18)[None], "attention_mask": torch.ones(1, 8).long()}
    far = {**text, "position_ids": torch.arange(8)[None] * 3}
    alone = [generate(model, asked, **GREEDY).sequences for asked in (text, far)]
    for asked, answer in zip((text, far, text, far), alone * 2, strict=True):
        assert torch.equal(generate(model, asked, prefix_cache=cache, **GREEDY).sequences, answer)
    assert cache.reused == 15  # 7 of the third's, 7 of the fourth's, and the first token's


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)


def by_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


def by_state(model: nn.Module) -> None:
    model.load_state_dict({name: 1.5 * value for name, value in model.state_dict().items()})


def swapped(model: nn.Module) -> None:
    new = nn.Linear(model.o_proj.in_features, model.o_proj.out_features, bias=False)
    model.o_proj = new.requires_grad_(False)


def hooked(model: nn.Module) -> None:
    model.o_proj.register_forward_hook(lambda _, __, out: 3 * out)


def replaced(model: nn.Module) -> None:
    plain = model.o_proj.forward
    model.o_proj.forward = lambda states: -plain(states)


CHANGES = [in_place, by_data, by_state, swapped, hooked, replaced]


@pytest.mark.parametrize("change", CHANGES)
def test_a_prompt_that_other_weights_read_is_not_taken(
    change: Callable[..., None], batch: Callable[..., Any]
) -> None:
    inputs, model = batch("llava", 1), families.build("llava")
    whole, cache = Backbone(model), PrefixCache()
    generate(whole, inputs, prefix_cache=cache, **GREEDY)
    change(whole.layers[1].self_attn)
    ours = generate(whole, inputs, prefix_cache=cache, **GREEDY)
    assert cache.reused == 0
    assert torch.equal(ours.sequences, generate(whole, inputs, **GREEDY).sequences)
    generate(whole, inputs, prefix_cache=cache, **GREEDY)
    assert cache.reused > 0
    assert len(cache._held) == 2, "a prompt that no longer holds is dropped"


@pytest.mark.parametrize("switch", ["loaded", "off", "other", "merged", "scaled"])
def test_a_prompt_is_not_taken_after_a_lora_is_switched(
    switch: str, batch: Callable[..., Any]
) -> None:
    peft = pytest.importorskip("peft")
    inputs, model = batch("llava", 1), families.build("llava")
    options = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    cache = PrefixCache()
    whole = Backbone(model)

    def load(name: str) -> None:
        config = peft.LoraConfig(r=2, **options)
        peft.inject_adapter_in_model(config, model, adapter_name=name)
        model.requires_grad_(False)

    def layers() -> list[Any]:
        return [
            m for m in model.modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)
        ]

    def turn() -> None:
        ours = generate(whole, inputs, prefix_cache=cache, **GREEDY)
        assert torch.equal(ours.sequences, generate(whole, inputs, **GREEDY).sequences)

    if switch != "loaded":
        load("one")
        load("two")
    turn()
    if switch == "loaded":
        load("one")
    for layer in layers():
        match switch:
            case "off":
                layer.enable_adapters(False)
            case "other":
                layer.set_adapter("one" if "two" in layer.active_adapters else "two")
            case "merged":
                layer.merge()
            case "scaled":
                layer.scale_layer(4.0)
    model.requires_grad_(False)
    turn()
    assert cache.reused == 0


def test_exits_that_were_trained_on_find_no_keys_of_before(batch: Callable[..., Any]) -> None:
    inputs, whole = batch("llava", 1), Backbone(families.build("llava"))
    parts = Exits(whole, families.depths("llava"))
    policy = ExitPolicy(dict.fromkeys(parts.depths, 0.05), first={})
    asked = {"exits": parts, "policy": policy, **GREEDY}
    cache = PrefixCache()
    generate(whole, inputs, prefix_cache=cache, **asked)
    with torch.no_grad():
        for parameter in parts.parameters():
            parameter.mul_(1.5)
    ours = generate(whole, inputs, prefix_cache=cache, **asked)
    assert cache.reused == 0
    plain = generate(whole, inputs, **asked)
    assert torch.equal(ours.sequences, plain.sequences)
    assert torch.equal(ours.depths, plain.depths)


def test_a_tower_is_the_same_after_it_has_run_for_the_first_time(batch: Callable[..., Any]) -> None:
    """Hugging Face hangs hooks there, which only note what goes by."""
    whole, cache = Backbone(families.build("llava")), VisionCache()
    for _ in range(3):
        generate(whole, batch("llava", 1), vision_cache=cache, max_new_tokens=1)
    assert (cache.misses, cache.hits) == (1, 2)


def test_features_of_a_tower_that_was_changed_are_made_anew() -> None:
    tower, image, cache = nn.Linear(3, 3), torch.ones(1, 3), VisionCache()
    with torch.inference_mode():
        cache.call(tower, (image,), {})
        assert cache.call(tower, (image,), {}) is not None and cache.hits == 1
    with torch.no_grad():
        tower.weight.mul_(2)
    assert torch.equal(cache.call(tower, (image,), {}), tower(image))
    assert cache.hits == 1


@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2.5-vl"])
def test_a_call_that_ends_before_the_stack_leaves_nothing_there(
    name: str, batch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hook that stayed would keep the next prompt's keys under this one's embeddings."""
    whole = Backbone(families.build(name))
    one = batch(name, 1)
    other = {**one, "pixel_values": one["pixel_values"].flip(0, -1) * 0.3}
    plain = [generate(whole, inputs, **GREEDY).sequences for inputs in (one, other)]
    cache, hooks = PrefixCache(), [len(m._forward_pre_hooks) for m in whole.model.modules()]

    def breaks(*_: Any, **__: Any) -> Any:
        raise MemoryError("no room for the image")

    vision = type(whole.vision)
    with monkeypatch.context() as patch:
        patch.setattr(vision, "forward", breaks)
        for _ in range(2):
            with pytest.raises(MemoryError):
                generate(whole, one, prefix_cache=cache, **GREEDY)
    assert [len(m._forward_pre_hooks) for m in whole.model.modules()] == hooks
    for inputs, alone in zip((other, one, other, one), plain[::-1] * 2, strict=True):
        ours = generate(whole, inputs, prefix_cache=cache, **GREEDY).sequences
        assert torch.equal(ours, alone)
    assert cache.reused > 0


def test_a_padded_prompt_is_run_whole_and_not_kept(
    backbone: Callable[..., Any], batch: Callable[..., Any]
) -> None:
    model = backbone("llava")
    row = one_row("llava", batch("llava", 2), 0)
    text = {"input_ids": row["input_ids"][:, :6].clamp(max=5) + 3}
    whole = torch.ones_like(text["input_ids"])
    padded = whole.clone()
    padded[:, :2] = 0
    cache = PrefixCache()
    generate(model, {**text, "attention_mask": whole}, prefix_cache=cache, **GREEDY)
    held, reused = len(cache._held), cache.reused
    assert held == 1
    asked = {**text, "attention_mask": padded}
    alone = generate(model, asked, **GREEDY).sequences
    assert torch.equal(generate(model, asked, prefix_cache=cache, **GREEDY).sequences, alone)
    assert (len(cache._held), cache.reused) == (held, reused)
    generate(model, {**text, "attention_mask": whole}, prefix_cache=cache, **GREEDY)
    assert cache.reused > reused
