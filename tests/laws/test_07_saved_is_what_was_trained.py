"""Law 7: what is saved is what was trained, no more; loaded, it gives the same logits; a wrong
backbone is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from adapters import DEPTHS, trained
from safetensors.torch import load_file

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.errors import AdapterError
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits
from offramp.core.save_and_load import EXITS

Build = Callable[..., Any]


@pytest.mark.parametrize("name", families.NAMES)
def test_a_loaded_adapter_generates_what_the_saved_one_did(
    name: str, backbone: Build, batch: Build, tmp_path: Path
) -> None:
    one, inputs = backbone(name), batch(name, 2)
    policy = ExitPolicy({2: 0.02, 4: 0.02}, score="margin")
    saved = trained(one, policy=policy)
    saved.save(tmp_path / "adapter")
    loaded = Adapter.load(tmp_path / "adapter", one)
    state = loaded.exits.modules.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in saved.exits.modules.state_dict().items())
    first, second = (a.generate(inputs, max_new_tokens=6, do_sample=False) for a in (saved, loaded))
    assert torch.equal(first.sequences, second.sequences)
    assert torch.equal(first.depths, second.depths)
    assert torch.equal(first.scores.nan_to_num(-1), second.scores.nan_to_num(-1))


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "paligemma"])
def test_the_saved_tensors_are_the_trainable_ones(
    name: str, backbone: Build, tmp_path: Path
) -> None:
    one = backbone(name)
    trained(one).save(tmp_path)
    exits = Exits(one, DEPTHS)
    wanted = {n: tuple(p.shape) for n, p in exits.named_parameters()}
    assert {n: tuple(t.shape) for n, t in load_file(tmp_path / EXITS).items()} == wanted
    assert (tmp_path / EXITS).stat().st_size < 1.2 * sum(p.nbytes for p in exits.parameters()) + 5e3


def test_a_loaded_adapter_is_frozen_and_in_the_backbones_precision(
    saved_adapter: Path, backbone: Build
) -> None:
    loaded = Adapter.load(saved_adapter, backbone("blip2-opt", torch.bfloat16))
    assert {p.dtype for p in loaded.exits.modules.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in loaded.exits.modules.parameters())


def test_loading_leaves_the_backbone_as_it_was(saved_adapter: Path, opt: Any) -> None:
    before = {n: t.clone() for n, t in opt.model.state_dict().items()}
    Adapter.load(saved_adapter, opt)
    assert all(torch.equal(before[n], t) for n, t in opt.model.state_dict().items())


def other_opt(**more: Any) -> Backbone:
    return Backbone(families.blip2(families.opt_config(**more)))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: Backbone(families.build("blip2-opt", seed=1)), "weights differ"),
        (lambda: other_opt(num_hidden_layers=5), "layers is 5, not 6"),
        (lambda: other_opt(hidden_size=16, word_embed_proj_dim=16), "width is 16, not 32"),
        (lambda: other_opt(vocab_size=97), "vocabulary is 97, not 96"),
        (lambda: Backbone(families.build("llava")), "model_type is llava, not blip-2"),
    ],
)
def test_another_backbone_is_refused_with_the_reason(
    build: Callable[[], Backbone], reason: str, saved_adapter: Path
) -> None:
    with pytest.raises(AdapterError, match=reason):
        Adapter.load(saved_adapter, build())
