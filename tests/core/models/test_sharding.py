"""A model that accelerate spreads over devices, or keeps in part on disk, decodes with exits."""

from __future__ import annotations

import families
import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import attach_align_device_hook_on_blocks

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.models.backbone import Backbone
from offramp.core.models.discovery.paths import discover
from offramp.core.models.exits import Exits
from offramp.core.models.fingerprint import fingerprint
from offramp.core.models.sharding import device_of
from offramp.features.self_check import check_decoding

DEEP = families.LAYERS // 2
"""From here on the layers are elsewhere."""


def places(model, first, second):
    """A device map: the deeper layers and what reads them on `second`."""
    stack = "model.language_model"
    inside = [f"{stack}.{name}" for name, _ in model.get_submodule(stack).named_children()]
    layers = [f"{stack}.layers.{i}" for i in range(families.LAYERS)]
    parts = ["model.vision_tower", "model.multi_modal_projector", "lm_head", *inside, *layers]
    parts.remove(f"{stack}.layers")
    deep = {*layers[DEEP:], f"{stack}.norm"}
    return {part: second if part in deep else first for part in parts}


@pytest.fixture
def on_disk(tmp_path):
    model = families.build("llava")
    where = places(model, "cpu", "disk")
    return dispatch_model(model, where, main_device="cpu", offload_dir=tmp_path / "offload")


@pytest.mark.slow
def test_decoding_with_layers_on_disk_is_the_models_own(on_disk, batch):
    whole = Backbone(on_disk)
    found = check_decoding(whole, batch("llava", 1), depths=(2, 4))
    outcomes = (found.plain, found.exits, found.first_token, found.lossless)
    assert all(map(found.holds, outcomes)), found
    assert all(p.is_meta for p in whole.layers[DEEP].parameters())  # and nothing stayed in memory


def test_layers_on_disk_are_found_by_watching(on_disk, batch):
    assert discover(on_disk, batch("llava", 1)).stack == "model.language_model"


def test_an_exit_before_a_layer_on_disk_is_its_copy_in_memory(on_disk, tmp_path):
    whole, plain = Backbone(on_disk), families.build("llava")
    exits = Exits(whole, (2, 4))
    layer = plain.model.language_model.layers[4]
    assert all(map(torch.equal, exits.at(4).parameters(), layer.parameters()))
    assert fingerprint(whole) == fingerprint(Backbone(plain))
    Adapter(whole, exits, ExitPolicy({2: 0.5})).save(tmp_path / "exits")
    assert Adapter.load(tmp_path / "exits", whole).exits.depths == (2, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_decoding_on_two_devices_is_the_models_own(batch):
    model = families.build("llava")
    where = places(model, 0, "cpu")
    attach_align_device_hook_on_blocks(model, {"": 0, **where}, dict.fromkeys(where, False))
    whole = Backbone(model)
    assert whole.sharded and device_of(Exits(whole, (4,)).at(4)).type == "cpu"
    inputs = {name: tensor.to(0) for name, tensor in batch("llava", 1).items()}
    found = check_decoding(whole, inputs, depths=(2, 4))
    outcomes = (found.plain, found.exits, found.first_token, found.lossless)
    assert all(map(found.holds, outcomes)), found
