"""Laws of propagated keys and values: a token runs as many layers as its depth, nothing waits, and
the first exit stays exact."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
import zoo
from decoding import CALM, EXACT, NEW, errors_by_depth, tokens_by_layer
from families import WORDLESS
from reference import Dice

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import ExitPolicy, GenerationOutput
from offramp.core.errors import InputError
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits
from offramp.engines import engine_named
from offramp.features.prefix_cache import PrefixCache
from offramp_lab.methods.propagate import Propagating

NAMES = ("blip2-opt", "blip2-t5", "llava", "gemma3", "qwen2.5-vl")
OPTIONS = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": WORDLESS}


def propagating(
    whole: Backbone, parts: Any, inputs: Any, policy: ExitPolicy, **options: Any
) -> GenerationOutput:
    return Propagating(whole, parts, policy).generate(inputs, **options)


@pytest.mark.parametrize("name", NAMES)
def test_a_token_runs_as_many_layers_as_its_depth(name: str, batch: Any, scored: Any):
    whole, inputs = Backbone(families.build(name)), batch(name, 1)
    scored(Dice(3))
    first, second = families.depths(name)
    exits, policy = (Exits(whole, (first, second)), ExitPolicy({first: 0.5, second: 0.5}, first={}))
    made, counts = tokens_by_layer(
        whole, lambda: propagating(whole, exits, inputs, policy, max_new_tokens=16, do_sample=False)
    )
    depths = made.depths[0].tolist()
    assert set(depths) == {first, second, whole.depth}
    prompt = 0 if whole.is_encoder_decoder else inputs["input_ids"].shape[1]
    steps = depths if whole.is_encoder_decoder else depths[1:]
    assert counts == [prompt + sum(d > i for d in steps) for i in range(whole.depth)]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_exact_at_the_first_exit_and_bounded_past_it(
    name: str, backbone: Any, exits: Any, batch: Any, scored: Any
):
    whole, parts = backbone(name, wide=CALM), exits(name, wide=CALM)
    first, second = parts.depths
    policy = ExitPolicy({first: 0.4, second: 0.5})
    scored(Dice(5))
    _, errors = errors_by_depth(whole, parts, batch(name, 4), policy, propagating)
    assert errors[first] <= EXACT
    assert EXACT < errors[whole.depth] < 1.0


@pytest.mark.parametrize("lens", [False, True])
@pytest.mark.parametrize("early", [False, True])
def test_if_every_token_exits_the_deeper_layers_see_at_most_the_prompt(
    early: bool, lens: bool, batch: Any
):
    whole, inputs = Backbone(families.build("llava")), batch("llava", 1)
    exits = Exits(whole, (2,), kind="lens" if lens else "layer")
    policy = ExitPolicy({2: 0.0}, first=None if early else {})
    made, counts = tokens_by_layer(
        whole, lambda: propagating(whole, exits, inputs, policy, max_new_tokens=9)
    )
    prompt = inputs["input_ids"].shape[1]
    assert made.depths.tolist() == [[2 if early else 6] + [2] * 8]
    assert counts == [prompt + 8] * 2 + [0 if early else prompt] * 4


@pytest.mark.parametrize("name", ["blip2-opt", "llava"])
def test_rows_that_end_change_no_other_row(name: str, backbone: Any, exits: Any, batch: Any):
    whole, inputs = backbone(name), batch(name, 4)
    policy = ExitPolicy(dict.fromkeys(families.depths(name), 0.03))
    free = propagating(whole, exits(name), inputs, policy, **OPTIONS)
    end = int(free.new_tokens[0, 3])
    made = propagating(
        whole, exits(name), inputs, policy, eos_token_id=end, pad_token_id=families.PAD, **OPTIONS
    )
    for row in range(4):
        tokens = free.new_tokens[row].tolist()
        stop = tokens.index(end) + 1 if end in tokens else made.depths.shape[1]
        assert made.new_tokens[row, :stop].tolist() == tokens[:stop]
        assert torch.equal(made.depths[row, :stop], free.depths[row, :stop])
        assert (made.depths[row, stop:] == 0).all()


def test_a_prefix_cache_keeps_no_approximate_prompt(backbone: Any, exits: Any, batch: Any):
    whole, inputs, cache = backbone("llava"), batch("llava", 1), PrefixCache()
    policy = ExitPolicy(dict.fromkeys(families.depths("llava"), 0.05))
    first, second = (
        propagating(whole, exits("llava"), inputs, policy, prefix_cache=cache, **OPTIONS)
        for _ in range(2)
    )
    assert cache.reused == 0 and torch.equal(first.sequences, second.sequences)


@pytest.mark.parametrize("name", ["lfm2_vl", "qwen3_5"])
def test_it_is_refused_where_it_would_save_nothing(name: str):
    model = zoo.build(name)
    whole, inputs = Backbone(model), zoo.inputs(name, model, 1)
    policy = ExitPolicy({2: 0.5})
    with pytest.raises(InputError, match="nothing would be saved") as caught:
        propagating(whole, Exits(whole, (2,)), inputs, policy, max_new_tokens=3)
    assert len(str(caught.value).splitlines()) == 2


def test_lossless_decoding_refuses_it(backbone: Any, exits: Any, batch: Any):
    policy = ExitPolicy({2: 0.5}, lossless=True)
    with pytest.raises(InputError, match="need exact ones"):
        propagating(backbone("llava"), exits("llava"), batch("llava", 1), policy)


def test_commands_know_it_as_an_engine(backbone: Any, exits: Any, batch: Any):
    adapter = Adapter(backbone("llava"), exits("llava"), ExitPolicy({2: 0.02}))
    ours = engine_named("propagate").open(adapter, threads=1)
    told = {"max_new_tokens": NEW, **OPTIONS}
    made = ours.generate(batch("llava", 1), **told)
    theirs = propagating(adapter.backbone, adapter.exits, batch("llava", 1), adapter.policy, **told)
    assert torch.equal(made.sequences, theirs.sequences)
