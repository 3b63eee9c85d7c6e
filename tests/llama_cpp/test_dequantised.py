"""Laws of a backbone with a GGUF format's weights: they are the file's, and only for a while."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fakes
import families
import numpy as np
import pytest
import torch
import training_runs
from gguf_cases import adapter_of, depths_of, refused

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import AHEAD, ExitPolicy
from offramp.core.errors import InputError
from offramp.core.models.backbone import Backbone
from offramp.core.models.fingerprint import fingerprint
from offramp.training.trainer import LEARNS_ON, train, train_drafting
from offramp_llama_cpp import Dequantised
from offramp_llama_cpp.architectures import architecture_of, layer_tensors

FITTED = pytest.param("iq4_nl", marks=pytest.mark.llama_cpp)
"""llama.cpp writes it."""


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0", "q5_0", FITTED])
@pytest.mark.parametrize("name", ["llava", "internvl", "internvl-experts", "blip2-opt"])
def test_weights_are_the_files(name: str, kind: str, exported: Callable[..., Path]) -> None:
    """Tensor by tensor, of all layers and of the head."""
    import gguf

    backbone, edges = adapter_of(name).backbone, [0, *depths_of(name)]
    architecture, folder = architecture_of(backbone), exported(name, kind)
    with Dequantised(backbone, kind):
        for place, first in enumerate(edges):
            layers = backbone.layers[first : [*edges, backbone.depth][place + 1]]
            reader = gguf.GGUFReader(folder / f"segment-{place}.gguf")
            held = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
            for number, layer in enumerate(layers):
                for tensor, array in layer_tensors(layer, architecture, backbone, len(layers)):
                    assert np.array_equal(held[f"blk.{number}.{tensor}"], array), tensor
        assert np.array_equal(held["token_embd.weight"], backbone.head.weight.detach().numpy())


def test_it_computes_with_them_and_gives_the_own_ones_back() -> None:
    backbone = Backbone(families.build("llava"))
    ids = torch.arange(8, 20)[None]

    def logits(of: Backbone) -> torch.Tensor:
        return of.logits(of.stack(input_ids=ids).last_hidden_state)

    with torch.no_grad():
        own, embedded = logits(backbone), backbone.stack.get_input_embeddings()(ids)
        state = {n: t.clone() for n, t in backbone.model.state_dict().items()}
        other = Dequantised(backbone, "q4_0")
        for _ in range(2):
            with other:
                there = logits(backbone)
                held = {n: t.clone() for n, t in backbone.model.state_dict().items()}
                assert torch.equal(backbone.stack.get_input_embeddings()(ids), embedded)
            assert torch.equal(logits(backbone), own)
        twin = Backbone(families.build("llava"))
        twin.head.weight = torch.nn.Parameter(torch.empty_like(twin.head.weight))
        twin.model.load_state_dict(held)
        assert torch.equal(logits(twin), there) and not torch.equal(there, own)
    assert all(torch.equal(backbone.model.state_dict()[n], t) for n, t in state.items())


def test_entered_twice_it_gives_the_own_weights_back_once() -> None:
    backbone = Backbone(families.build("llava"))
    own = backbone.head.weight.detach().clone()
    one, other = Dequantised(backbone, "q4_0"), Dequantised(backbone, "q8_0")
    with one:
        there = backbone.head.weight.detach().clone()
        with one:
            pass
        assert torch.equal(backbone.head.weight, there) and not torch.equal(there, own)
        refused(other.__enter__, InputError, "other weights than q8_0")
    with other:
        assert not torch.equal(backbone.head.weight, own)
    assert torch.equal(backbone.head.weight, own)


def test_exits_learn_from_them_and_are_of_the_backbone(tmp_path: Path) -> None:
    """States are the rounded one's; the adapter says the format, and fits the model as it is."""
    backbone = Backbone(families.build("blip2-opt"), name="tiny")
    before = fingerprint(backbone)
    how = (backbone, fakes.Blip2FakeProcessor("blip2-opt"), fakes.examples(12), training_runs.SHORT)
    plain = train(*how, tmp_path / "plain")
    made = train(*how, tmp_path / "made", teacher=Dequantised(backbone, "q4_0"))
    assert fingerprint(backbone) == before
    loaded = Adapter.load(tmp_path / "made", backbone)
    assert (loaded.of_format, plain.of_format) == ("q4_0", None)
    assert "q4_0" in (tmp_path / "made" / "README.md").read_text(encoding="utf-8")
    was, now = (adapter.exits.modules.state_dict() for adapter in (plain, made))
    assert any(not torch.equal(was[name], now[name]) for name in was)


@pytest.mark.slow
def test_exits_of_another_learn_on_before_they_draft(tmp_path: Path) -> None:
    """From a format's answers their layers learn too, once, and the guarantee is not of these."""
    backbone = Backbone(families.build("blip2-opt"), name="tiny")
    how = (fakes.Blip2FakeProcessor("blip2-opt"), fakes.examples(16), training_runs.SHORT)
    first = train(backbone, how[0], fakes.examples(12), how[2], tmp_path / "first")
    first = first.with_policy(ExitPolicy({2: 0.3}), {"kept": True})
    teacher = Dequantised(backbone, "q4_0")
    rate = training_runs.SHORT.learning_rate / LEARNS_ON
    how = (*how[:2], replace(training_runs.SHORT, learning_rate=rate))
    made = train_drafting(first, *how, tmp_path / "made", teacher=teacher)
    assert made.calibration is None and made.of_format == "q4_0"
    drafts = dict.fromkeys(made.exits.depths, AHEAD)
    assert made.policy == replace(first.policy, drafts=drafts, max_draft=4)
    assert {*first.seen["train"]} < {*made.seen["train"]}
    was, now = (adapter.exits.modules.state_dict() for adapter in (first, made))
    assert any(not torch.equal(now[name], tensor) for name, tensor in was.items())
    loaded = Adapter.load(tmp_path / "made", backbone)
    again = train_drafting(loaded, *how, tmp_path / "again", teacher=teacher)
    layers = {n: t for n, t in again.exits.modules.state_dict().items() if "drafts" not in n}
    assert layers and all(torch.equal(now[name], tensor) for name, tensor in layers.items())
    refused(lambda: train_drafting(loaded, *how, tmp_path / "no"), InputError, "--of-format q4_0")


def test_unknown_formats_are_refused() -> None:
    backbone = adapter_of("llava").backbone
    refused(lambda: Dequantised(backbone, "q4_2"), InputError, "q4_1")
