"""Law 1: never exiting gives what stock greedy `generate` gives, token for token, in batches of 1
and of N, whatever else `generate` is asked for."""

from __future__ import annotations

import fakes
import families
import pytest
import torch
from decoding import NEW, greedy, never
from families import NAMES, PAD, WORDLESS

from offramp.core.decoding.policy import ExitPolicy
from offramp.core.engine.generate import generate
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROWS = (1, 4)


CLOSE = ("gemma3", "llava")
"""Families whose tiny models have nearly equal logits in bfloat16."""


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            name, dtype, marks=[fakes.NEEDS_BF16] if (name in CLOSE and dtype == "bfloat16") else []
        )
        for name in NAMES
        for dtype in DTYPES
    ],
)
def test_without_exits_or_with_exits_that_never_fire_it_is_greedy_generate(
    name, dtype, backbone, exits, batch
):
    whole, parts = backbone(name, DTYPES[dtype]), exits(name, DTYPES[dtype])
    for rows in ROWS if dtype == "float32" else (4,):
        inputs = batch(name, rows, DTYPES[dtype])
        theirs = greedy(whole.model, inputs, max_new_tokens=8)
        with_exits = {"exits": parts, "policy": never(name)}
        for given in ({}, with_exits):
            ours = generate(whole, inputs, max_new_tokens=8, do_sample=False, **given)
            assert torch.equal(ours.sequences, theirs), (rows, bool(given))
            assert (ours.depths == whole.depth).all()


@pytest.mark.parametrize("name", NAMES)
def test_greedy_outputs_vary_with_image_and_step(name, backbone, batch):
    """Of the tests themselves: a model that says one thing would agree with anything."""
    model = backbone(name).model
    inputs = batch(name, 4)
    others = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1) + 1.0}
    new = greedy(model, inputs)[:, -NEW:]
    assert len(set(new.flatten().tolist())) >= 5
    assert not torch.equal(new, greedy(model, others)[:, -NEW:])


@pytest.mark.parametrize("name", ["llava", "blip2-t5"])
@pytest.mark.parametrize("score", ["margin", "idle"])
def test_whatever_the_score_that_no_token_reaches(score, name, backbone, exits, batch, idle):
    depths = (1, 2, 3, 5)  # at 1 an exit must be certain, or a layer idle
    policy = ExitPolicy(dict.fromkeys(depths, 1.0), score=score)
    whole, parts = backbone(name), exits(name, depths=depths)
    options = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": WORDLESS}
    for rows in ROWS:
        inputs = batch(name, rows)
        made = generate(whole, inputs, exits=parts, policy=policy, **options)
        assert (made.depths == whole.depth).all()
        assert torch.equal(made.sequences, whole.model.generate(**inputs, **options))


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "llava"])
def test_a_lora_backbone_equals_its_own_generate(name, batch):
    from peft import LoraConfig, get_peft_model

    plain = families.build(name)
    inputs = batch(name, 4)
    without = greedy(plain, inputs)
    targets = ["q", "v"] if name == "blip2-t5" else ["q_proj", "v_proj"]
    lora = LoraConfig(target_modules=targets, init_lora_weights=False, r=4, lora_alpha=16)
    model = get_peft_model(plain, lora).eval()
    theirs = greedy(model, inputs)
    assert not torch.equal(theirs, without)
    whole = Backbone(model)
    exits = Exits(whole, families.depths(name))
    options = {"max_new_tokens": NEW, "do_sample": False}
    ours = generate(whole, inputs, exits=exits, policy=never(name), **options)
    assert torch.equal(ours.sequences, theirs)


# -- what else `generate` may be asked for ----------------------------------------------------


class Forbid:
    """A user's own processor: some tokens may not come."""

    def __call__(self, ids, scores):
        return scores.index_fill(1, torch.arange(8, 40), float("-inf"))


class Overwrite(Forbid):
    """As `Forbid`, but writing into what it is given."""

    def __call__(self, ids, scores):
        scores[:, 8:40] = float("-inf")
        return scores


OPTIONS = {
    "min_new_tokens": {"min_new_tokens": 8, "eos_token_id": list(range(8, 60)), "pad_token_id": 0},
    "max_length": {"max_length": 16, "max_new_tokens": None},
    "sampling": {"do_sample": True},
    "temperature": {"do_sample": True, "temperature": 0.7},
    "top_k": {"do_sample": True, "top_k": 5},
    "top_p": {"do_sample": True, "top_p": 0.8, "temperature": 1.3},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[i] for i in range(8, 30)]},
    "logits_processor": {"logits_processor": [Forbid()]},
    "overwriting processor": {"logits_processor": [Overwrite()]},
    "stopping_criteria": {"stopping_criteria": [lambda ids, _: ids[:, -1] > 60]},
    "num_return_sequences": {"do_sample": True, "num_return_sequences": 3},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["blip2-opt", "llava", "florence2"])
def test_an_option_of_generate_does_what_it_does_there(name, option, backbone, exits, batch):
    whole = backbone(name)
    options = {"max_new_tokens": NEW, "do_sample": False, **OPTIONS[option]}
    for rows in ROWS if name == "llava" else (4,):
        inputs = batch(name, rows)
        torch.manual_seed(3)
        theirs = whole.model.generate(**inputs, **options)
        torch.manual_seed(3)
        ours = generate(whole, inputs, exits=exits(name), policy=never(name), **options)
        assert torch.equal(ours.sequences, theirs), rows


def test_a_generation_config_is_honoured(backbone, batch):
    from transformers import GenerationConfig

    whole, inputs = backbone("llava"), batch("llava", 1)
    config = GenerationConfig(max_new_tokens=5, repetition_penalty=1.8, pad_token_id=PAD)
    theirs = whole.model.generate(**inputs, generation_config=config)
    assert torch.equal(generate(whole, inputs, generation_config=config).sequences, theirs)


def test_a_padded_decoder_prompt_is_masked_in_every_step(backbone, exits, batch):
    """Encoder-decoders take a second mask, for a decoder prompt of several tokens."""
    whole, parts = backbone("blip2-t5"), exits("blip2-t5")
    given = {
        **batch("blip2-t5", 2),
        "decoder_input_ids": torch.tensor([[PAD, 20, 21, 22], [PAD, PAD, 30, 31]]),
        "decoder_attention_mask": torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]),
    }
    options = {"max_new_tokens": NEW, "do_sample": False}
    ours = generate(whole, given, exits=parts, policy=never("blip2-t5"), **options)
    assert (ours.depths == whole.depth).all()
    assert torch.equal(ours.sequences, whole.model.generate(**given, **options))


@pytest.mark.parametrize("name", NAMES)
def test_the_end_token_stops_a_row_and_pads_what_follows(name, backbone, exits, batch):
    whole = backbone(name)
    for rows in ROWS if name == "llava" else (4,):
        inputs = batch(name, rows)
        free = greedy(whole.model, inputs)[:, -NEW:]
        end = {"eos_token_id": int(free[0, 4]), "pad_token_id": PAD}
        theirs = greedy(whole.model, inputs, **end)
        options = {"max_new_tokens": NEW, "do_sample": False, **end}
        ours = generate(whole, inputs, exits=exits(name), policy=never(name), **options)
        assert torch.equal(ours.sequences, theirs)
        for tokens, depths in zip(ours.new_tokens.tolist(), ours.depths.tolist(), strict=True):
            stop = tokens.index(end["eos_token_id"]) + 1 if end["eos_token_id"] in tokens else None
            assert all(d == whole.depth for d in depths[:stop])
            if stop is not None:
                assert set(tokens[stop:]) <= {PAD} and set(depths[stop:]) <= {0}
