"""What a check showed is used for prompts of the kind, the parts and the lengths that it saw."""

from __future__ import annotations

import fakes
import families
import home_made
import pytest
import torch
import zoo
from transformers import LogitsProcessor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.engine.generate import generate
from offramp.core.errors import UnsupportedBackboneError
from offramp.core.models.backbone import Backbone
from offramp.core.models.discovery.probe import text_prompt
from offramp.core.models.exits import Exits
from offramp.features.input_processor import InputProcessor
from offramp.features.prefix_cache import PrefixCache
from offramp.features.self_check import check_untested
from offramp.serving.batch_engine import BatchEngine
from offramp.serving.core import EngineCore
from offramp.serving.engine_config import EngineConfig
from offramp.serving.request import Request

TYPES = ["gemma4_unified", "granite4_vision", "molmo2", "qwen3_vl_moe"]
"""Image prompts of these look ahead, or get features between layers; text does neither."""
DEPTH = 1


def answered(backbone, exits, inputs):
    policy = ExitPolicy({DEPTH: 0.0}, first={DEPTH: 0.0})
    return generate(backbone, inputs, exits=exits, policy=policy, max_new_tokens=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", TYPES)
def test_an_image_after_a_text_gets_what_an_image_gets_alone(name):
    model = zoo.build(name)
    image = zoo.inputs(name, model, 1)
    one, other = Backbone(model, example=image), Backbone(model, example=image)
    exits = Exits(one, (DEPTH,))
    alone = answered(one, exits, image)
    answered(other, exits, text_prompt(model))
    after = answered(other, exits, image)
    assert torch.equal(alone.depths, after.depths)
    assert torch.equal(alone.sequences, after.sequences)
    assert not other.family.causal_prompt


class Forced(LogitsProcessor):
    """Says the tokens of an answer."""

    def __init__(self, prompt, tokens):
        self.prompt, self.tokens = prompt, tokens

    def __call__(self, ids, scores):
        place = ids.shape[1] - self.prompt
        return torch.full_like(scores, -torch.inf).index_fill(1, self.tokens[place : place + 1], 0)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("door", ["generate", "engine"])
def test_a_first_token_that_exits_out_of_a_prompt_that_looks_ahead_costs_no_later_one(name, door):
    """Of a type whose prompts were taken for causal: those that it had been shown are."""
    model = zoo.build(name)
    image = zoo.inputs(name, model, 1)
    whole = Backbone(model, example=image)
    whole.learn(causal_prompt=True, lossless=True)
    exits, policy = Exits(whole, (DEPTH,)), ExitPolicy({DEPTH: 1.0}, first={DEPTH: 0.0})
    greedy = {"max_new_tokens": 8, "do_sample": False}
    for _ in range(2):
        if door == "generate":
            made = generate(whole, image, exits=exits, policy=policy, **greedy)
        else:
            core = EngineCore(whole, exits, policy, EngineConfig(slots=2, limit=128))
            handle = core.add(Request(image, options=greedy))
            core.run()
            made = handle.result(timeout=0).output
    forced = Forced(image["input_ids"].shape[1], made.new_tokens[0])
    own = model.generate(
        **image,
        **greedy,
        logits_processor=[forced],
        output_logits=True,
        return_dict_in_generate=True,
    )
    for place, depth in enumerate(made.depths[0].tolist()):
        if depth == whole.depth:
            assert own.logits[place][0].argmax() == made.new_tokens[0, place]


def test_a_kind_that_was_not_seen_is_checked_when_it_first_comes():
    """No example shows the image beforehand here."""
    name = "qwen3_vl_moe"
    model = zoo.build(name)
    image = zoo.inputs(name, model, 1)
    one, other = Backbone(model), Backbone(model)
    exits = Exits(one, (DEPTH,))
    alone = answered(one, exits, image)
    answered(other, exits, text_prompt(model))
    after = answered(other, exits, image)
    assert torch.equal(alone.sequences, after.sequences)
    assert torch.equal(alone.depths, after.depths)
    assert len(other.readings.verdicts) == 2


def test_a_live_engine_checks_a_kind_when_it_first_comes():
    name = "qwen3_vl_moe"
    model = zoo.build(name)
    image, greedy = zoo.inputs(name, model, 1), {"max_new_tokens": 4, "do_sample": False}
    one, other = Backbone(model), Backbone(model)
    policy = ExitPolicy({DEPTH: 0.0}, first={DEPTH: 0.0})
    exits = Exits(one, (DEPTH,))
    alone = generate(one, image, exits=exits, policy=policy, **greedy)
    adapter = Adapter(other, exits, policy)
    with BatchEngine(adapter, config=EngineConfig(slots=2, limit=64)) as engine:
        engine.submit(text_prompt(model), **greedy).result(timeout=60)
        after = engine.submit(image, **greedy).result(timeout=60).output
    assert torch.equal(alone.sequences, after.sequences)
    assert torch.equal(alone.depths, after.depths)


def test_a_kind_that_was_not_seen_comes_between_answers_under_way():
    name = "qwen3_vl_moe"
    model = zoo.build(name)
    image, text = zoo.inputs(name, model, 1), text_prompt(model)
    one, other = Backbone(model), Backbone(model)
    policy = ExitPolicy({DEPTH: 0.0}, first={DEPTH: 0.0})
    exits = Exits(one, (DEPTH,))
    alone = [answered(one, exits, inputs) for inputs in (image, text)]
    core = EngineCore(other, exits, policy, EngineConfig(slots=3, limit=64))
    options = {"max_new_tokens": 4, "do_sample": False}
    before = core.add(Request(text, options=options))
    core.round()
    late = [core.add(Request(inputs, options=options)) for inputs in (image, text)]
    core.run()
    for handle, theirs in zip(late, alone, strict=True):
        ours = handle.result(timeout=0).output
        assert torch.equal(ours.sequences, theirs.sequences)
        assert torch.equal(ours.depths, theirs.depths)
    assert before.result(timeout=0)


def test_a_prompt_whose_tokens_see_later_ones_is_not_continued_from_a_kept_one(batch):
    """Nothing above the exit looks ahead, so the first token may exit; parts are another thing."""
    inputs = batch("llava", 1)
    more = torch.arange(10, 13)[None]
    longer = {
        name: torch.cat([inputs[name], fill], 1)
        for name, fill in (("input_ids", more), ("attention_mask", torch.ones_like(more)))
    }
    longer = {**inputs, **longer}
    backbone = Backbone(home_made.build(home_made.SeesThePrompt), example=inputs)
    kept = PrefixCache()
    for given in (inputs, inputs, longer):
        ours = generate(backbone, given, prefix_cache=kept, max_new_tokens=6, do_sample=False)
        theirs = backbone.model.generate(**given, max_new_tokens=6, do_sample=False)
        assert torch.equal(ours.sequences, theirs)
    assert kept.reused == 0


class StateBesideFrom40(LlamaDecoderLayer):
    """The mean of all states so far, kept beside the cache, is added from 40 tokens on."""

    def forward(self, hidden_states, *args, cache=None, **kw):  # type: ignore[no-untyped-def]
        kept = self.__dict__.setdefault("kept", {})
        total, count = kept.get(id(cache), (0, 0))
        total, count = total + hidden_states.sum(1, keepdim=True), count + hidden_states.shape[1]
        kept[id(cache)] = total, count
        if count >= 40:
            hidden_states = hidden_states + 0.3 * total / count
        return super().forward(hidden_states, *args, cache=cache, **kw)


@pytest.mark.slow
def test_what_only_a_long_text_shows_is_found_before_training(batch):
    inputs = batch("llava", 1)
    model = home_made.build(home_made.ByName)
    for layer in model.model.language_model.layers.values():
        layer.__class__ = StateBesideFrom40
    backbone = Backbone(model, example=inputs)
    generate(backbone, inputs, max_new_tokens=2)  # short texts are right
    encoder = InputProcessor(backbone, fakes.Blip2FakeProcessor("llava"))
    with pytest.raises(UnsupportedBackboneError, match="part 3"):
        check_untested(encoder, fakes.examples(1))


def test_a_copy_of_a_backbone_finds_out_for_itself(batch):
    inputs = batch("llava", 1)
    backbone = Backbone(home_made.build(home_made.Window), example=inputs)
    copied = backbone.with_decoding(lean=True)
    generate(copied, inputs, max_new_tokens=2)
    assert copied.readings.verdicts and not backbone.readings.verdicts


class SeesAnImage(home_made.Stack):
    """As `SeesThePrompt`, where an image is shown."""

    shown = False

    def enter(self, h, positions):  # type: ignore[no-untyped-def]
        return h + h.mean(1, keepdim=True) if self.shown and h.shape[1] > 1 else h


def test_a_live_engine_hands_out_nothing_that_was_wrongly_read_in_parts(batch, monkeypatch):
    """It read texts before an image came whose tokens look ahead."""
    image, greedy = batch("llava", 1), {"max_new_tokens": 6, "do_sample": False}
    model = families.build("llava")
    model.model.language_model.__class__ = SeesAnImage
    backbone = Backbone(model)
    core = EngineCore(backbone, config=EngineConfig(slots=2, limit=64, budget=3))
    core.add(Request(text_prompt(model), options=greedy))
    core.run()
    assert not backbone.reads_in_parts  # code that no test knows
    monkeypatch.setattr(SeesAnImage, "shown", True)
    late = [core.add(Request(image, options=greedy)) for _ in range(3)]
    core.run()
    own = model.generate(**image, **greedy)
    for each in late:
        assert torch.equal(each.result(timeout=0).output.sequences, own)
