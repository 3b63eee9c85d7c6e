"""Laws of the exits: nothing shared, copies at first, and read as the model reads itself."""

from __future__ import annotations

import pytest
import torch

import families
from families import NAMES
from offramp.errors import InputError
from offramp.exits import Exits, check_depths, propose_depths
from reference import probe


def storages(module):
    tensors = [*module.parameters(), *module.buffers()]
    return {t.untyped_storage().data_ptr() for t in tensors}


# -- law 8 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_no_two_exits_share_storage_with_each_other_or_the_backbone(name, backbone):
    whole = backbone(name)
    exits = Exits(whole, range(1, whole.depth))
    owners = [whole.model, *exits.values()]
    owned = [storages(owner) for owner in owners]
    assert sum(map(len, owned)) == len(set().union(*owned))


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_exit_computes_what_the_next_layer_computes(name, backbone, batch):
    whole = backbone(name)
    exits = Exits(whole, range(1, whole.depth))
    seen = probe(whole, batch(name, 4), exits=exits)
    for depth in exits.depths:
        assert torch.equal(seen.estimates[depth], seen.outputs[depth + 1])


@pytest.mark.parametrize("name", NAMES)
def test_changing_an_exit_changes_nothing_else(name, backbone):
    whole = backbone(name)
    exits = Exits(whole, families.depths(name))
    one, other = (exits.at(depth) for depth in exits.depths)
    before = {k: v.clone() for k, v in [*whole.model.state_dict().items()]}
    kept = {k: v.clone() for k, v in other.state_dict().items()}
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
    assert all(torch.equal(v, kept[k]) for k, v in other.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in whole.model.state_dict().items())


def test_exits_are_trainable_and_the_backbone_stays_frozen(backbone):
    whole = backbone("llava")
    exits = Exits(whole, (2, 4))
    assert all(parameter.requires_grad for parameter in exits.parameters())
    assert not any(parameter.requires_grad for parameter in whole.model.parameters())


def test_state_dict_keys_start_with_the_depth(backbone):
    keys = Exits(backbone("llava"), (4, 2)).state_dict()
    assert {key.split(".")[0] for key in keys} == {"2", "4"}


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


# -- law 2 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_last_state_reads_as_the_models_own_logits(name, backbone, batch):
    whole = backbone(name)
    seen = probe(whole, batch(name, 4))
    with torch.inference_mode():
        ours = whole.read(whole.finish(seen.outputs[whole.depth]))
    theirs = seen.logits[whole.depth]
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()
