"""Laws of what tells whether modules still compute what they computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fakes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from torch import nn

from offramp.core.models.change import Unchanged, state_of, tokens_of


def inside(tokenizer: Any) -> None:
    tokenizer._tokenizer = Tokenizer.from_str(tokenizer._tokenizer.to_str())


SPELLINGS: dict[str, Callable[[Any], Any]] = {
    "a token is added": lambda it: it.add_tokens(["brand", "new"]),
    "a mark is added": lambda it: it.add_special_tokens({"additional_special_tokens": ["<turn>"]}),
    "the end token is another": lambda it: setattr(it, "eos_token", "w9"),
    "padding is on the other side": lambda it: setattr(it, "padding_side", "left"),
    "what is inside is another": inside,
    "texts are lowered": lambda it: setattr(it._tokenizer, "normalizer", normalizers.Lowercase()),
    "texts are split otherwise": lambda it: setattr(
        it._tokenizer, "pre_tokenizer", pre_tokenizers.Whitespace()
    ),
    "tokens are joined otherwise": lambda it: setattr(
        it._tokenizer, "decoder", decoders.WordPiece()
    ),
}


@given(st.lists(st.sampled_from(sorted(SPELLINGS)), unique=True, max_size=4))
@settings(max_examples=25, deadline=None)
def test_records_of_tokenizers_that_differ_in_anything_both_survive(changes: list[str]) -> None:
    """One by one, each change is seen; without one, nothing is."""
    tokenizer = fakes.word_level()
    records: list[Any] = [tokens_of(tokenizer)]
    for change in changes:
        SPELLINGS[change](tokenizer)
        assert tokens_of(tokenizer) not in records, change
        assert tokens_of(tokenizer) == tokens_of(tokenizer)
        records.append(tokens_of(tokenizer))
    assert tokens_of(fakes.word_level()) not in records


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.BatchNorm1d(3)])
        self.hook = self.layers[0].register_forward_pre_hook(lambda *_: None)
        self.scale, self.merged, self.scaling = 2.0, ["a"], {"a": 1.0}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.scale * x


def write(tower: Any) -> None:
    with torch.no_grad():
        tower.layers[0].weight.mul_(2)


def another_hook(tower: Any) -> None:
    tower.hook.remove()
    tower.layers[0].register_forward_pre_hook(lambda *_: None)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a weight is written": write,
    "a buffer is written": lambda tower: tower.layers[1].running_mean.add_(1),
    "a weight is another": lambda tower: setattr(
        tower.layers[0], "weight", nn.Parameter(torch.zeros(3, 3))
    ),
    "its values lie elsewhere": lambda tower: tower.layers[0].weight.set_(torch.zeros(3, 3)),
    "a weight is gone": lambda tower: setattr(tower.layers[0], "bias", None),
    "weights are loaded": lambda tower: tower.load_state_dict(Tower().state_dict()),
    "a layer is another": lambda tower: tower.layers.__setitem__(0, nn.Linear(3, 3)),
    "a layer more": lambda tower: tower.layers.append(nn.Linear(3, 3)),
    "a layer less": lambda tower: tower.layers.__delitem__(1),
    "a hook comes": lambda tower: tower.layers[0].register_forward_hook(lambda *_: None),
    "a hook takes another's place": another_hook,
    "it is set to train": lambda tower: tower.train(not tower.training),
    "its forward is another": lambda tower: setattr(tower, "forward", lambda x: x),
    "a number is another": lambda tower: setattr(tower, "scale", 3.0),
    "a number more": lambda tower: setattr(tower, "more", 1),
    "a number by another name": lambda tower: vars(tower).update(more=vars(tower).pop("scale")),
    "a switch in a list": lambda tower: tower.merged.append("b"),
    "a switch in a table": lambda tower: tower.scaling.__setitem__("a", 0.5),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_seen(name: str) -> None:
    tower = Tower()
    same, version = Unchanged(lambda: (tower,)), state_of(tower)
    assert same()
    with torch.no_grad():
        CHANGES[name](tower)
    assert state_of(tower) != version
    assert not same()


def test_what_changes_no_result_is_none() -> None:
    tower = Tower().eval()
    same = Unchanged(lambda: (tower,))
    tower(torch.zeros(2, 3))
    tower.layers[0].weight.requires_grad_(False)
    tower.scale = float("2.0")  # another object, and equal
    tower.layers[0].register_state_dict_pre_hook(lambda *_: None)
    assert same() and same()


@pytest.mark.parametrize("laid_out", ["to_mkldnn", "to_sparse"])
def test_a_tensor_without_an_address_is_watched_too(laid_out: str) -> None:
    module = nn.Module()
    module.register_buffer("packed", getattr(torch.ones(4, 4), laid_out)())
    unchanged = Unchanged(lambda: (module,))
    assert unchanged()
    module.packed = getattr(torch.zeros(4, 4), laid_out)()
    assert not unchanged()
