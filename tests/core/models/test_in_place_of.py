"""What stands in a module's place looks like the module: models ask it what it takes and has."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import zoo
from torch import nn

from offramp import BatchEngine, EngineConfig, generate
from offramp.core.models.backbone import Backbone
from offramp.core.models.in_place_of import InPlaceOf
from offramp.features.vision_cache import RememberedTower, VisionCache


class Tower(nn.Module):
    kind = "tower"

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 3, dtype=torch.bfloat16)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, pixel_values: torch.Tensor, bbox: Any = None, *, scale: float = 1) -> Any:
        return self.inner(pixel_values) * scale


def test_signature_attributes_and_parameters_are_the_modules_own() -> None:
    tower = Tower()
    stand_in: Any = RememberedTower(tower, VisionCache())
    assert inspect.signature(stand_in.forward) == inspect.signature(tower.forward)
    assert stand_in.kind == "tower" and stand_in.inner is tower.inner
    assert next(stand_in.parameters()) is tower.inner.weight
    assert [name for name, _ in stand_in.named_parameters()] == ["inner.weight", "inner.bias"]
    assert next(stand_in.buffers()) is tower.mean
    assert [name for name, _ in stand_in.named_buffers()] == ["mean"]
    with pytest.raises(AttributeError):
        stand_in.what_no_module_has  # noqa: B018
    pixels = torch.ones(1, 2, dtype=torch.bfloat16)
    assert torch.equal(stand_in.forward(pixels, scale=2), tower(pixels, scale=2))


def test_it_owns_nothing_of_the_module() -> None:
    """A model that holds it counts and saves no parameter twice."""
    holder = nn.ModuleDict({"own": (own := Tower()), "other": InPlaceOf(own)})
    assert [*holder.state_dict()] == ["own.mean", "own.inner.weight", "own.inner.bias"]
    assert len([*holder.modules()]) == 4


@pytest.mark.parametrize("name", ["t5gemma2", "udop", "hunyuan_vl", "gemma4"])
def test_the_image_reaches_an_encoder_that_is_asked_what_it_takes(name: str) -> None:
    """With a vision cache and in slots, as without both."""
    model = zoo.build(name)
    inputs = zoo.inputs(name, model, 1)
    backbone, how = Backbone(model, example=inputs), {"max_new_tokens": 6, "do_sample": False}
    own = model.generate(**inputs, **how)
    for cache in (None, VisionCache()):
        assert torch.equal(generate(backbone, inputs, vision_cache=cache, **how).sequences, own)
    config = EngineConfig(slots=2, limit=64)
    with BatchEngine(backbone, vision_cache=VisionCache(), config=config) as engine:
        for _ in range(2):
            made = engine.submit(inputs, **how).result().output.sequences
            assert torch.equal(made, own)


def test_where_heads_differ_from_layer_to_layer_slots_are_counted_by_the_widest() -> None:
    from offramp.serving.slot_memory import _widest_row

    config = zoo.build("gemma4").config.get_text_config()
    rows = [config.per_layer_config[n] for n in range(config.num_hidden_layers)]
    assert _widest_row(config) == max(row.head_dim * row.num_key_value_heads for row in rows)
