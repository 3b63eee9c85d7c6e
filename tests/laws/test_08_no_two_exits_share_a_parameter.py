"""Law 8: no two exits share a parameter, with each other or with the backbone."""

from __future__ import annotations

import families
import pytest
import torch
from families import NAMES

from offramp.core.models.exits import Exits


def storages(module):
    tensors = [*module.parameters(), *module.buffers()]
    return {t.untyped_storage().data_ptr() for t in tensors}


@pytest.mark.parametrize("name", NAMES)
def test_no_two_exits_share_storage_with_each_other_or_the_backbone(name, backbone):
    whole = backbone(name)
    exits = Exits(whole, range(1, whole.depth))
    owners = [whole.model, *exits.values()]
    owned = [storages(owner) for owner in owners]
    assert sum(map(len, owned)) == len(set().union(*owned))


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
