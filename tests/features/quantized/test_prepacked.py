"""Laws of prepacked weights: the same numbers in another order, so the same answers."""

from __future__ import annotations

import fakes
import families
import pytest
import torch
from torch import nn

from offramp.adapter.adapter import Adapter
from offramp.adapter.records import load_parts
from offramp.core.decoding.policy import FULL, ExitPolicy
from offramp.core.errors import InputError
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet
from offramp.core.models.fingerprint import fingerprint
from offramp.core.save_and_load import read_config
from offramp.engines import packed as packed_engine
from offramp.engines.packed import prepack
from offramp.features.description import describe
from offramp.features.quantized import prepacked as prepacking
from offramp.features.quantized.prepacked import PrepackedLinear, prepacked
from offramp_llama_cpp.architectures import architecture_of, layer_tensors

GREEDY = {"max_new_tokens": 10, "do_sample": False}
DEPTH = 2


@pytest.fixture
def packed(monkeypatch):
    """`packed(name)`: a tiny backbone with exits and a shortlist, plain and prepacked."""
    monkeypatch.setattr(prepacking, "LEAST", 0)

    def made(name):
        pair = []
        for _ in range(2):
            whole = Backbone(families.build(name))
            torch.manual_seed(1)
            exits = ExitSet(Exits(whole, (DEPTH,)), torch.arange(4, 40))
            pair.append(Adapter(whole, exits, ExitPolicy({DEPTH: 0.03})))
        packed_engine.open(pair[1])
        return pair

    return made


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=fakes.NEEDS_BF16)]
)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 33])
def test_products_are_those_of_the_plain_weight(dtype, tokens):
    torch.manual_seed(0)
    plain = nn.Linear(96, 48).to(dtype).requires_grad_(False)
    made, states = prepacked(plain), torch.randn(2, tokens, 96).to(dtype)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    for given in (states, states[0], states[:1, :, :], states[..., :1, :]):
        assert torch.allclose(made(given), plain(given), **close)
    assert torch.equal(made.dense(), plain.weight)


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "llava", "qwen3-vl", "gemma3"])
def test_answers_in_every_mode_are_those_of_plain_weights(name, packed, batch):
    plain, laid_out = packed(name)
    count = sum(isinstance(part, PrepackedLinear) for part in laid_out.backbone.layers.modules())
    assert count > 0 and isinstance(
        laid_out.exits.shortlist_head(laid_out.backbone), PrepackedLinear
    )
    inputs = families.one_row(name, batch(name, 1), 0)
    for policy in (
        FULL,
        plain.policy,
        ExitPolicy({DEPTH: 0.03}, lossless=True),
        ExitPolicy({DEPTH: 0.03}, shortlist=True),
        ExitPolicy({DEPTH: 0.9}),
    ):
        ours, theirs = (a.generate(inputs, policy=policy, **GREEDY) for a in (laid_out, plain))
        assert torch.equal(ours.sequences, theirs.sequences)
        assert torch.equal(ours.depths, theirs.depths)
        assert torch.allclose(ours.scores, theirs.scores, atol=1e-5, equal_nan=True)


def test_an_adapter_on_prepacked_weights_is_saved_as_it_was(packed, tmp_path):
    plain, laid_out = packed("blip2-opt")
    packed_engine.open(laid_out)  # what is laid out stays so
    assert fingerprint(laid_out.backbone) == fingerprint(plain.backbone)
    assert describe(laid_out.backbone)["quantized"] is None
    for number, adapter in enumerate((plain, laid_out)):
        adapter.save_pretrained(tmp_path / str(number))
    first, second = (
        load_parts(read_config(tmp_path / str(n)), plain.backbone).exits.modules.state_dict()
        for n in (0, 1)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    copied = Exits(laid_out.backbone, (DEPTH,)).state_dict()
    assert all(torch.equal(copied[name], plain.exits.modules.state_dict()[name]) for name in copied)


def test_small_weights_in_float32_stay_plain():
    """Where the layout costs more than it brings."""
    whole = Backbone(families.build("llava"))
    prepack(whole)
    assert not any(isinstance(part, PrepackedLinear) for part in whole.layers.modules())


def test_a_precision_that_a_processor_cannot_multiply_in_is_refused():
    with pytest.raises(InputError, match="no matrix multiplication in float64"):
        prepacked(nn.Linear(8, 8).double())
    with pytest.raises(InputError, match="the model is on meta"):
        prepacked(nn.Linear(8, 8, device="meta"))


def test_nothing_is_trained_through_prepacked_weights():
    made, states = prepacked(nn.Linear(8, 8)), torch.randn(3, 8, requires_grad=True)
    with pytest.raises(InputError, match="inference alone"):
        made(states)
    with torch.no_grad():
        made(states)


def test_files_for_other_runtimes_have_the_same_weights(packed):
    plain, laid_out = (
        dict(layer_tensors(b.layers[0], architecture_of(b), b, b.depth))
        for b in (adapter.backbone for adapter in packed("llava"))
    )
    assert plain.keys() == laid_out.keys() and len(plain) > 5
    assert all((plain[name] == laid_out[name]).all() for name in plain)
