"""What linears of real libraries mean, where these are: the extra quant."""

from __future__ import annotations

import pytest
import torch

from offramp.adapter.shipped import tiny_folder
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits
from offramp.core.models.hub import load_processor
from offramp.core.models.weights import scheme
from offramp.data.scenes.tasks import captions
from offramp.features.input_processor import InputProcessor
from offramp.features.self_check import check_decoding


def torchao(bits):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    if bits != 4:
        dynamic = quantization.Int8DynamicActivationInt8WeightConfig
        return TorchAoConfig(quantization.Int8WeightOnlyConfig() if bits == 8 else dynamic())
    return TorchAoConfig(quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4))


def bitsandbytes(bits):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)


def quanto(bits):
    pytest.importorskip("optimum.quanto")
    from transformers import QuantoConfig

    return QuantoConfig(weights="int8")


@pytest.mark.parametrize(
    ("config", "bits"),
    [
        (torchao, 8),
        (torchao, 4),
        (torchao, "8 and states"),
        (bitsandbytes, 8),
        (bitsandbytes, 4),
        (quanto, 8),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_an_exit_computes_what_the_quantised_layer_does(config, bits):
    folder = tiny_folder("opt")
    options = {"quantization_config": config(bits)}
    whole = Backbone.from_pretrained(folder, dtype=torch.float32, **options)
    encoder = InputProcessor(whole, load_processor(folder))
    found = check_decoding(whole, encoder.prompts(captions("test", 2).examples), depths=(3,))
    assert all(map(found.holds, (found.plain, found.exits))), found
    apart = (config, bits) not in ((bitsandbytes, 8), (torchao, "8 and states"))
    assert whole.lossless == apart, found  # what rounds states makes noise a step of 8 bits
    assert found.holds(found.lossless) or not apart, found
    layer, exit = whole.layers[3], Exits(whole, (3,)).at(3)  # after it has run, as it then lies
    assert scheme(layer) is not None and scheme(exit) is None
    states = torch.randn(1, 5, whole.width)
    with torch.inference_mode():
        ours, theirs = exit.fc1(states), layer.fc1(states)
    allowed = 0.02 * theirs.abs().max()  # 8 bits of bitsandbytes round the states too
    assert float((ours - theirs).abs().max()) < allowed
