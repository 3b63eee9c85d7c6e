"""Types that nobody registered, from their model to a saved adapter, as the documentation says."""

from __future__ import annotations

import fakes
import pytest
import torch
import zoo

from offramp.adapter.adapter import Adapter
from offramp.adapter.shipped import tiny_folder
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.errors import UnsupportedBackboneError
from offramp.core.models import registry
from offramp.core.models.backbone import Backbone
from offramp.features.input_processor import InputProcessor
from offramp.training.config import TrainConfig
from offramp.training.trainer import train

CONFIG = TrainConfig(
    exit_kind="layer",
    depths=(2,),
    steps=2,
    batch_size=4,
    evaluate_every=2,
    max_new_tokens=3,
    adversarial=0.0,
)


def trained(name, out):
    model = zoo.build(name)
    whole = Backbone(model, example=zoo.inputs(name, model, 1))
    processor = fakes.ZooFakeProcessor(name, model)
    return train(whole, processor, fakes.examples(8), CONFIG, out), processor


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral3", "udop", "vision-encoder-decoder"])
def test_exits_are_trained_saved_loaded_and_decode(name, tmp_path):
    adapter, processor = trained(name, tmp_path)
    whole = adapter.backbone
    loaded = Adapter.load(tmp_path, whole).with_policy(ExitPolicy({2: 0.0}, lossless=True))
    inputs = InputProcessor(whole, processor).prompts(fakes.examples(1))
    own = whole.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=5, do_sample=False).sequences, own)


def test_a_decoder_that_joins_the_image_itself_is_refused_in_two_lines(tmp_path):
    with pytest.raises(UnsupportedBackboneError, match="joins the image") as caught:
        trained("git", tmp_path)
    assert len(str(caught.value).splitlines()) == 2


def test_the_example_that_watching_needs_is_made_with_the_processor_beside_the_model(monkeypatch):
    monkeypatch.delitem(registry.TEXT_FAMILIES, "opt")
    assert Backbone.from_pretrained(tiny_folder("opt")).family.discovered
