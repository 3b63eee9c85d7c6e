"""Laws of the exits: nothing shared, copies at first, and read as the model reads itself."""

from __future__ import annotations

import families
import pytest
import torch
from families import NAMES, WORDLESS
from reference import Dice, of_steps, probe

from offramp.engine.confidence import SCORES
from offramp.engine.generate import generate
from offramp.engine.policy import ExitPolicy
from offramp.errors import InputError
from offramp.models.backbone import Backbone
from offramp.models.exits import Exits, check_depths, propose_depths


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


# -- the lens ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_lens_reads_the_state_that_enters_the_layer_as_if_it_were_the_last(name, backbone, batch):
    whole = backbone(name)
    exits = Exits(whole, range(1, whole.depth), lens=True)
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
    exits = Exits(backbone("llava"), (2, 4), lens=True)
    assert not list(exits.parameters()) and not exits.state_dict()


@pytest.mark.parametrize("kv", ["recompute", "propagate"])
def test_a_token_that_leaves_at_a_lens_runs_exactly_the_layers_below_it(kv, batch):
    whole = Backbone(families.build("llava"))
    inputs = batch("llava", 1)
    exits, policy = Exits(whole, (2,), lens=True), ExitPolicy({2: 0.0}, kv=kv)
    counts = [0] * whole.depth
    for index, layer in enumerate(whole.layers):

        def count(_module, args, _out, index=index):
            counts[index] += args[0].shape[1]

        layer.register_forward_hook(count)
    made = generate(whole, inputs, exits=exits, policy=policy, max_new_tokens=9)
    prompt = inputs["input_ids"].shape[1]
    assert made.depths.tolist() == [[6] + [2] * 8]
    assert counts == [prompt + 8] * 2 + [prompt] * 4


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_cache_is_exact_though_a_lens_keeps_no_keys(
    name, lossless, backbone, batch, monkeypatch
):
    monkeypatch.setitem(SCORES, "max_probability", Dice(5))
    whole, inputs, new = backbone(name, wide=0.1), batch(name, 1 if lossless else 4), 12
    first, second = families.depths(name)
    exits = Exits(whole, (first, second), lens=True)
    policy = ExitPolicy({first: 0.4, second: 0.5}, lossless=lossless)
    options = {"max_new_tokens": new, "do_sample": False, "suppress_tokens": WORDLESS}
    made = generate(whole, inputs, exits=exits, policy=policy, **options)
    if lossless:
        assert torch.equal(made.sequences, generate(whole, inputs, **options).sequences)
        return
    uncached = probe(whole, inputs, made.sequences, exits)
    said = made.sequences[:, -new:]
    assert set(made.depths.flatten().tolist()) == {first, second, whole.depth}
    for depth in (first, second, whole.depth):
        logits = of_steps(uncached.logits[depth], new).clone()
        logits[..., WORDLESS] = -torch.inf
        wanted = logits.argmax(-1)
        assert torch.equal(said[made.depths == depth], wanted[made.depths == depth])


@pytest.mark.parametrize("name", NAMES)
def test_a_lens_generates_under_propagate(name, backbone, batch, monkeypatch):
    monkeypatch.setitem(SCORES, "max_probability", Dice(5))
    whole = backbone(name)
    first, second = families.depths(name)
    made = generate(
        whole,
        batch(name, 4),
        exits=Exits(whole, (first, second), lens=True),
        policy=ExitPolicy({first: 0.4, second: 0.5}, kv="propagate"),
        max_new_tokens=8,
    )
    assert set(made.depths.flatten().tolist()) == {first, second, whole.depth}


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
        ours = whole.logits(whole.final_norm(seen.outputs[whole.depth]))
    theirs = seen.logits[whole.depth]
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()
