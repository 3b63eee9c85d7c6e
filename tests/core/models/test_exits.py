"""Laws of the exits: nothing shared, copies at first, and read as the model reads itself."""

from __future__ import annotations

import pytest
import torch
from families import NAMES
from reference import probe

from offramp.core.errors import InputError
from offramp.core.models.exits import Exits, check_depths, propose_depths


def test_exits_are_trainable_and_the_backbone_stays_frozen(backbone):
    whole = backbone("llava")
    exits = Exits(whole, (2, 4))
    assert all(parameter.requires_grad for parameter in exits.parameters())
    assert not any(parameter.requires_grad for parameter in whole.model.parameters())


def test_state_dict_keys_start_with_the_depth(backbone):
    keys = Exits(backbone("llava"), (4, 2)).state_dict()
    assert {key.split(".")[0] for key in keys} == {"2", "4"}


# -- the lens ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_lens_reads_the_state_that_enters_the_layer_as_if_it_were_the_last(name, backbone, batch):
    whole = backbone(name)
    exits = Exits(whole, range(1, whole.depth), kind="lens")
    entered = {}
    handles = [
        whole.layers[d].register_forward_pre_hook(lambda _, args, d=d: entered.update({d: args[0]}))
        for d in exits.depths
    ]
    try:
        seen = probe(whole, batch(name, 4), exits=exits)
    finally:
        for handle in handles:
            handle.remove()
    with torch.inference_mode():
        for depth in exits.depths:
            raw = entered[depth] if whole.norm is None else whole.norm(entered[depth])
            assert torch.equal(seen.logits[depth], whole.logits(raw))
            assert not torch.equal(seen.logits[depth], seen.logits[whole.depth])


def test_a_lens_has_no_parameters(backbone):
    exits = Exits(backbone("llava"), (2, 4), kind="lens")
    assert not list(exits.parameters()) and not exits.state_dict()


# -- depths -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "depths",
    [(), (0,), (6,), (7,), (-1,), (2, 2), (True,), (2.0,), (2.5,), ("2",), (None,)],
    ids=str,
)
def test_depths_that_do_not_fit_are_refused(depths):
    with pytest.raises(InputError, match="Exit depths"):
        check_depths(depths, 6)


def test_depths_come_back_sorted():
    assert check_depths([4, 1, 5], 6) == (1, 4, 5)


@pytest.mark.parametrize("layers", [2, 3, 6, 12, 24, 32])
def test_as_many_depths_are_proposed_as_asked_for(layers):
    for exits in range(1, layers):
        depths = propose_depths(layers, exits)
        assert len(depths) == exits
        assert check_depths(depths, layers) == depths


@pytest.mark.parametrize("exits", [0, 6, -1])
def test_a_number_of_exits_that_does_not_fit_is_refused(exits):
    with pytest.raises(InputError, match="1 to 5"):
        propose_depths(6, exits)
