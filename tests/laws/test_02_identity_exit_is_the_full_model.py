"""Law 2: an identity exit at full depth gives the full model's logits."""

from __future__ import annotations

import pytest
import torch
from families import NAMES
from reference import probe

from offramp.core.models.exits import Exits


@pytest.mark.parametrize("name", NAMES)
def test_the_last_state_reads_as_the_models_own_logits(name, backbone, batch):
    whole = backbone(name)
    seen = probe(whole, batch(name, 4))
    with torch.inference_mode():
        ours = whole.logits(whole.final_norm(seen.outputs[whole.depth]))
    theirs = seen.logits[whole.depth]
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_exit_computes_what_the_next_layer_computes(name, backbone, batch):
    """So that one behind the last layer but one gives the full model's logits too."""
    whole = backbone(name)
    exits = Exits(whole, range(1, whole.depth))
    seen = probe(whole, batch(name, 4), exits=exits)
    for depth in exits.depths:
        assert torch.equal(seen.estimates[depth], seen.outputs[depth + 1])
    ours, theirs = seen.logits[whole.depth - 1], seen.logits[whole.depth]
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()
