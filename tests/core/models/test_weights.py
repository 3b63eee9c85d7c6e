"""Exits beside quantised linears are float copies of the values that the backbone computes with."""

from __future__ import annotations

import families
import pytest
import torch
import training_runs
from torch import nn

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.engine.generate import generate
from offramp.core.errors import AdapterError, UnsupportedBackboneError
from offramp.core.executors import bare
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits
from offramp.core.models.weights import float_copy, is_quantized, scheme
from offramp.core.storage import read_json, write_json
from offramp.features.description import describe
from offramp.features.self_check import check_decoding
from offramp.serving.core import EngineCore
from offramp.serving.engine_config import EngineConfig
from offramp.serving.request import Request


class Codes(torch.Tensor):
    """A weight in 8 bits and a scale a row, as libraries hold them: an opaque tensor subclass."""

    @staticmethod
    def __new__(cls, codes, scales):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scales.dtype)

    def __init__(self, codes, scales):
        self.codes, self.scales = codes, scales

    def dequantize(self):
        return self.codes.to(self.scales.dtype) * self.scales

    def __repr__(self):
        return "Codes()"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return type(args[0])(args[0].codes, args[0].scales)
        assert func.namespace == "aten", func  # a library's tensor knows no other operators
        plain = [a.dequantize() if isinstance(a, Codes) else a for a in args]
        return func(*plain, **(kwargs or {}))


class NarrowCodes(Codes):
    """The same in 6 bits."""


def quantize(module, kind=Codes, top=127):
    for part in module.modules():
        if isinstance(part, nn.Linear):
            scales = part.weight.detach().abs().amax(1, keepdim=True) / top
            codes = (part.weight.detach() / scales).round().to(torch.int8)
            part.weight = nn.Parameter(kind(codes, scales), requires_grad=False)


@pytest.fixture
def quantized():
    model = families.build("llava").requires_grad_(False)
    quantize(model.model.language_model)
    return Backbone(model)


def test_an_exit_is_a_float_copy_of_the_quantised_layer(quantized):
    layer = quantized.layers[2]
    exit = Exits(quantized, (2,)).at(2)
    assert scheme(layer) == "Codes" and scheme(exit) is None
    assert torch.equal(exit.mlp.up_proj.weight, layer.mlp.up_proj.weight.dequantize())
    states = torch.randn(1, 3, families.WIDTH)
    exit.mlp(states).sum().backward()
    assert exit.mlp.up_proj.weight.grad is not None


def test_decoding_is_the_quantised_models_own(quantized, batch, monkeypatch):
    monkeypatch.setattr(bare, "_LEAST", 1)  # as of large weights
    found = check_decoding(quantized, batch("llava", 1), depths=(2, 4))
    outcomes = (found.plain, found.exits, found.first_token, found.lossless)
    assert all(map(found.holds, outcomes)), found


def test_an_adapter_goes_there_and_back(quantized, tmp_path):
    Adapter(quantized, Exits(quantized, (2,)), ExitPolicy({2: 0.5})).save(tmp_path)
    again = Adapter.load(tmp_path, quantized)
    assert again.exits.depths == (2,)


def test_a_float_models_adapter_loads_beside_it_with_a_warning_and_without_its_guarantee(
    quantized, tmp_path
):
    plain = Backbone(families.build("llava"))
    Adapter(plain, Exits(plain, (2,)), ExitPolicy({2: 0.5})).save(tmp_path)
    with pytest.warns(UserWarning, match="calibrate again"):
        assert Adapter.load(tmp_path, quantized).calibration is None
    other = Backbone(families.build("llava", seed=1))
    quantize(other.model.model.language_model)
    with pytest.raises(AdapterError, match="differ"):
        Adapter.load(tmp_path, other)


def test_an_adapter_of_another_scheme_loads_with_a_warning_and_without_its_guarantee(
    quantized, tmp_path
):
    Adapter(quantized, Exits(quantized, (2,)), ExitPolicy({2: 0.5})).save(tmp_path)
    narrow = families.build("llava").requires_grad_(False)
    quantize(narrow.model.language_model, NarrowCodes, 31)
    with pytest.warns(UserWarning, match=r"in Codes, this one is in NarrowCodes: calibrate again"):
        assert Adapter.load(tmp_path, Backbone(narrow)).calibration is None


def test_training_beside_half_precision_moves_every_tensor(tmp_path):
    model = families.build("llava", torch.bfloat16).requires_grad_(False)
    quantize(model.model.language_model)
    run = training_runs.trainer(Backbone(model), tmp_path)
    before = {name: tensor.clone() for name, tensor in run.exits.state_dict().items()}
    adapter = run.run()
    after = run.exits.state_dict()
    assert not [name for name, tensor in before.items() if torch.equal(tensor, after[name])]
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert {p.dtype for p in adapter.exits.modules.parameters()} == {torch.bfloat16}


def test_what_an_exit_will_take_is_said_in_floats(quantized):
    layer = families.build("llava").model.language_model.layers[0]
    assert describe(quantized)["exit_bytes"] == 4 * sum(p.numel() for p in layer.parameters())


def test_weights_that_transformers_does_not_read_are_refused_in_two_lines(tmp_path):
    families.build("llava").save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", {**config, "quantization_config": {"quant_method": "odd"}})
    with pytest.raises(UnsupportedBackboneError, match=r"'odd'.*were not read") as caught:
        Backbone.from_pretrained(tmp_path)
    assert len(str(caught.value).splitlines()) == 2


def test_a_scheme_that_is_not_known_is_refused_in_two_lines():
    class Packed(nn.Linear):
        pass

    odd = Packed(4, 4)
    odd.weight = nn.Parameter(torch.zeros(4, 2, dtype=torch.uint8), requires_grad=False)
    assert is_quantized(odd)
    with pytest.raises(UnsupportedBackboneError, match="Packed") as caught:
        float_copy(nn.Sequential(odd), torch.float32)
    assert len(str(caught.value).splitlines()) == 2


class Grid(nn.Module):
    """A linear of a library that nobody here knows: codes in a buffer, and no weight."""

    def __init__(self, linear, twist=0.0):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("codes", (linear.weight.detach() * 64).round().to(torch.int8))
        self.register_buffer("bias", linear.bias)
        self.twist = twist

    def forward(self, states):
        return states @ (self.codes.to(states) / 64).T + self.bias + self.twist * states.abs().sum()


def test_a_linear_is_read_by_what_it_makes_of_unit_vectors():
    odd = Grid(nn.Linear(8, 4))
    assert is_quantized(odd) and scheme(odd) == "Grid"
    plain = float_copy(nn.Sequential(odd), torch.float32)[0]
    assert torch.allclose(plain.weight, odd.codes / 64) and torch.equal(plain.bias, odd.bias)


@pytest.mark.parametrize("layer", [Grid(nn.Linear(8, 4), twist=1.0), nn.Conv1d(2, 2, 1)], ids=str)
def test_what_cannot_be_read_as_floats_is_refused_in_two_lines(layer):
    if isinstance(layer, nn.Conv1d):  # as experts are: quantised, and no linear
        layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UnsupportedBackboneError, match="cannot be read as floats") as caught:
        float_copy(nn.Sequential(layer), torch.float32)
    assert len(str(caught.value).splitlines()) == 2


class Dynamic(Grid):
    """Each state is rounded to 8 bits of its own."""

    large = float("inf")

    def forward(self, states):
        rows = states.flatten(0, -2)
        step = rows.abs().amax(1, keepdim=True).clamp_min(1e-6) / 127
        kept = (rows.abs() >= self.large).any(0)
        rounded = torch.where(kept, rows, (rows / step).round() * step)
        return super().forward(rounded.view_as(states))


class WithOutliers(Dynamic):
    """But for the places where any state of the call is large."""

    large = 6.0


class OfFloats(Grid):
    """States are rounded to floats of 8 bits."""

    def forward(self, states):
        scale = states.abs().amax(-1, keepdim=True).clamp_min(1e-6) / 448
        return super().forward((states / scale).to(torch.float8_e4m3fn).to(states) * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Grid, Dynamic, WithOutliers, OfFloats])
def test_lossless_is_refused_where_states_are_rounded_and_a_request_is_served_alone(
    kind, dtype, batch
):
    model = families.build("llava", dtype).requires_grad_(False)
    for layer in model.model.language_model.layers:
        for name, linear in [*layer.mlp.named_children()]:
            if isinstance(linear, nn.Linear):
                linear.bias = nn.Parameter(linear.weight[:, 0] * 0, requires_grad=False)
                setattr(layer.mlp, name, kind(linear))
    whole, inputs = Backbone(model), batch("llava", 1, dtype)
    exits, policy = Exits(whole, (2,)), ExitPolicy({2: 0.0}, lossless=True)
    asked = {"exits": exits, "max_new_tokens": 4, "do_sample": False}
    if kind is Grid:
        assert generate(whole, inputs, policy=policy, **asked).rounds
        return
    with pytest.raises(UnsupportedBackboneError, match=f"{kind.__name__} rounds") as caught:
        generate(whole, inputs, policy=policy, **asked)
    assert len(str(caught.value).splitlines()) == 2
    whole.learn(causal_prompt=True, lossless=True)
    assert not whole.lossless
    core = EngineCore(whole, exits, policy, EngineConfig(slots=3, limit=64))
    options = {"max_new_tokens": 12, "do_sample": False}
    several = [{**inputs, "pixel_values": inputs["pixel_values"] * n} for n in (1, 30, -1)]
    handles = [core.add(Request(each, "lossless", options=options)) for each in several]
    core.run()
    for each, handle in zip(several, handles, strict=True):
        own = model.generate(**each, **options)
        assert torch.equal(handle.result(timeout=0).output.sequences, own)


def test_a_lora_beside_quantised_weights_stays_in_the_copy(quantized):
    from peft import LoraConfig, inject_adapter_in_model

    layer = inject_adapter_in_model(LoraConfig(target_modules=["up_proj"]), quantized.layers[2])
    torch.nn.init.normal_(layer.mlp.up_proj.lora_B["default"].weight)
    copied, states = float_copy(layer, torch.float32), torch.randn(1, 3, families.WIDTH)
    assert scheme(copied) is None
    assert torch.allclose(copied.mlp(states), layer.mlp(states), atol=1e-5)


def test_a_shortlist_reads_rows_of_a_quantised_head():
    model = families.build("llava").requires_grad_(False)
    rows = model.lm_head.weight[[3, 5]].clone()
    quantize(nn.Sequential(model.lm_head))
    head = Backbone(model).head_rows(torch.tensor([3, 5]))
    assert torch.allclose(head.weight, rows, atol=0.01) and type(head.weight) is nn.Parameter
