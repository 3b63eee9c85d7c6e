"""Weights in 8 and 4 bits, in one word: what the linears compute, and whole models of them."""

from __future__ import annotations

import families
import pytest
import torch
from command_line import assert_two_lines
from torch import nn

from offramp.adapter.adapter import Adapter
from offramp.adapter.shipped import tiny_exits
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.errors import InputError
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits
from offramp.core.models.weights import float_copy, scheme
from offramp.engines.loading import open_backbone
from offramp.features.description import describe
from offramp.features.quantized import linears
from offramp.features.quantized.attention import attention_by_token
from offramp.features.quantized.linears import SCHEMES, QuantizedLinear, quantize_layers
from offramp.features.self_check import check_decoding

ROUNDED = {"int8": 0.012, "int4": 0.11}
"""The largest relative error that a weight of random numbers may get."""
WORDS = pytest.mark.parametrize("word", SCHEMES)


def linear(rows=48, columns=96, bias=True):
    torch.manual_seed(0)
    return nn.Linear(columns, rows, bias=bias).bfloat16().requires_grad_(False)


@WORDS
@pytest.mark.parametrize("bias", [True, False])
def test_a_quantised_linear_is_its_weight_rounded(word, bias):
    plain = linear(bias=bias)
    made = SCHEMES[word](plain)
    copied = float_copy(nn.Sequential(made), torch.float32)[0]
    apart = (copied.weight - plain.weight.float()).norm() / plain.weight.float().norm()
    assert 0 < apart < ROUNDED[word]
    states = torch.randn(2, 3, 96).bfloat16()
    assert torch.allclose(made(states).float(), copied(states.float()), rtol=0.02, atol=0.02)


@WORDS
def test_what_a_token_gets_does_not_depend_on_those_beside_it(word):
    made, states = SCHEMES[word](linear()), torch.randn(17, 96).bfloat16()
    alone = torch.cat([made(row[None]) for row in states])
    assert torch.equal(made(states), alone)
    assert torch.equal(made(states[None].expand(2, -1, -1)[:, 3:5]), alone[3:5].expand(2, -1, -1))


@WORDS
def test_a_weight_of_one_value_is_kept(word):
    plain = linear()
    plain.weight.fill_(0.5)
    made = SCHEMES[word](plain)(torch.ones(1, 96).bfloat16())
    assert torch.allclose(made, plain(torch.ones(1, 96).bfloat16()), rtol=0.01)


def quantized(name, word):
    model = families.build(name, torch.bfloat16)
    quantize_layers(Backbone(model).layers, word)
    return Backbone(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "word"), [("llava", "int8"), ("llava", "int4"), ("blip2-t5", "int4")]
)
def test_a_quantised_model_decodes_as_its_own_generate(name, word, batch):
    backbone = quantized(name, word)
    assert scheme(backbone.layers) == word == describe(backbone)["quantized"]
    assert not [part for part in backbone.layers.modules() if type(part) is nn.Linear]
    found = check_decoding(backbone, batch(name, 1, torch.bfloat16), depths=(2, 4))
    # Kernels over one row and over two round differently in these formats.
    assert found.exact and found.holds(found.lossless), found
    inputs = batch(name, 1, torch.bfloat16)
    adapter = Adapter(backbone, Exits(backbone, (2,)), ExitPolicy({2: 0.5}))
    full, lossless = (
        adapter.generate(**inputs, mode=mode, max_new_tokens=8, do_sample=False)
        for mode in ("full", "lossless")
    )
    assert torch.equal(full.sequences, lossless.sequences)


@pytest.mark.parametrize("hidden", [0, 3])
def test_attention_of_several_tokens_is_that_of_each_alone(hidden):
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = True, 3
    queries, keys = torch.randn(1, 6, 4, 16).bfloat16(), torch.randn(2, 1, 2, 41, 16).bfloat16()
    mask = torch.ones(4, 41, dtype=torch.bool).tril(37)[None, None]
    mask[..., :hidden] = False
    together, _ = attention_by_token(module, queries, *keys, mask)
    for token in range(4):
        seen = 38 + token
        own = mask[:, :, token : token + 1, :seen] if hidden else None
        one, _ = attention_by_token(
            module, queries[:, :, token : token + 1], *keys[:, :, :, :seen], own
        )
        assert torch.equal(together[:, token : token + 1], one)


@WORDS
def test_linears_that_kernels_cannot_read_stay_as_they_are(word):
    layers = nn.ModuleList([nn.Sequential(linear(), linear(48, 80), linear(40, 96))])
    quantize_layers(layers, word)
    assert [type(part) is nn.Linear for part in layers[0]] == [False, True, word == "int4"]


def test_one_word_loads_a_model_quantised_and_exits_of_the_float_model_say_calibrate_again():
    backbone = open_backbone("tiny-opt", quantize="int4")[0]
    held = [part for part in backbone.layers.modules() if isinstance(part, QuantizedLinear)]
    assert len(held) == 6 * backbone.depth and type(backbone.head) is nn.Linear
    with pytest.warns(UserWarning, match=r"in float, this one is in int4: calibrate again"):
        assert Adapter.from_pretrained(backbone, tiny_exits("opt")).calibration is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quantize": "int3"}, "'int3' is not known"),
        ({"quantize": "int4", "dtype": "float32"}, "float32 was asked for"),
    ],
)
def test_a_mistake_is_said_before_the_model_is_loaded(options, said):
    with pytest.raises(InputError, match=said) as caught:
        open_backbone("no/such-model", **options)
    assert len(str(caught.value).splitlines()) == 2


def test_what_is_quantised_already_or_does_not_fit_is_refused_in_two_lines():
    loaded = quantized("llava", "int8")
    with pytest.raises(InputError, match="quantised already, in int8") as twice:
        linears.quantized(loaded, "int4")
    with pytest.raises(InputError, match="No linear of the decoder") as odd:
        quantize_layers(nn.ModuleList([nn.Sequential(linear(48, 80))]), "int4")
    assert {len(str(caught.value).splitlines()) for caught in (twice, odd)} == {2}


def test_commands_take_the_word(run, trained, photos, caplog):
    image = ("--image", photos / "0.png", "--max-new-tokens", 4)
    code, out, _ = run("generate", "--adapter", trained, "--quantize", "int8", *image)
    assert code == 0 and out and "calibrate again" in caplog.text
    contradicts = ("--quantize", "int4", "--dtype", "float32")
    assert_two_lines(run("generate", "--adapter", trained, *contradicts, *image), "float32")
    assert_two_lines(run("inspect", trained, "--quantize", "int4"), "--quantize")
    export = ("export", "--adapter", trained, "--gguf", "f16", "--out", photos / "gguf")
    assert_two_lines(run(*export, "--quantize", "int4"), "--quantize")


def test_commands_lay_weights_out(run, trained, photos):
    ask = ("generate", "--adapter", trained, "--image", photos / "0.png", "--max-new-tokens", 4)
    plain, laid_out = run(*ask), run(*ask, "--engine", "packed")
    assert plain[0] == 0 and plain[:2] == laid_out[:2]
