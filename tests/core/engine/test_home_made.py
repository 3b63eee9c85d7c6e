"""Decoders that somebody changed are refused or right, by whatever way they are reached."""

from __future__ import annotations

from functools import cache

import fakes
import home_made
import pytest
import torch
from reference import Noted

from offramp import Adapter, attach
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.engine.generate import generate
from offramp.core.errors import UnsupportedBackboneError
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits
from offramp.serving.batch_engine import BatchEngine
from offramp.serving.core import EngineConfig, EngineCore
from offramp.serving.request import Request
from offramp.training.config import TrainConfig
from offramp.training.trainer import train

UNLIKE_ITSELF = (home_made.NoiseByCall, home_made.StateBeside)
"""Whose own answers differ from call to call, so that nothing can be held to them."""
KINDS = [*home_made.STACKS, *home_made.LAYERS, *home_made.HEADS]
KINDS = [kind for kind in KINDS if kind not in UNLIKE_ITSELF]
RIGHT = [
    home_made.ByName,
    home_made.Capped,
    home_made.Biased,
    home_made.CappedAndBiased,
    home_made.Sliced,
    home_made.Tempered,
    home_made.TemperedALittle,
    home_made.Window,
    home_made.Strided,
    home_made.EverySecond,
    home_made.PositionsEnter,
    home_made.ScaledFrom24,
]
"""What must not be refused."""
NEW = 8
ROUNDING = 2e-5
SOON = {"max_new_tokens": NEW, "do_sample": False}
DRAFTS = ExitPolicy({3: 0.0}, lossless=True)


def named(kind):
    return getattr(kind, "__name__", None)


@pytest.fixture
def loaded(batch):
    return lambda kind: Backbone(home_made.build(kind), example=batch("llava", 1))


@cache
def of_itself(kind):
    """What a model answers that nobody opened."""
    model, inputs = home_made.build(kind), home_made.families.KINDS["llava"].inputs(1)
    return model.generate(**inputs, **SOON, output_logits=True, return_dict_in_generate=True)


def by_generate(whole, inputs):
    noted = Noted()
    return generate(whole, inputs, observer=noted, **SOON).sequences, noted


def by_drafts(whole, inputs):
    noted = Noted()
    made = generate(whole, inputs, exits=Exits(whole, (3,)), policy=DRAFTS, observer=noted, **SOON)
    return made.sequences, noted


def by_attach(whole, inputs):
    adapter = attach(whole, Exits(whole, (3,))).with_policy(DRAFTS)
    return whole.model.generate(**inputs, custom_generate=adapter, **SOON), None


def by_engine(whole, inputs):
    adapter = Adapter(whole, Exits(whole, (3,)), DRAFTS)
    with BatchEngine(adapter, config=EngineConfig(slots=2, limit=64)) as engine:
        handles = [engine.submit(inputs, **SOON) for _ in range(2)]
        one, other = (handle.result(timeout=60).output.sequences for handle in handles)
    assert torch.equal(one, other)
    return one, None


@pytest.mark.parametrize("door", [by_generate, by_drafts, by_attach, by_engine], ids=named)
@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_the_models_own_answer_or_none(kind, door, loaded, batch):
    inputs = batch("llava", 1)
    try:
        whole = loaded(kind)
        ours, noted = door(whole, inputs)
    except UnsupportedBackboneError as error:
        assert kind not in RIGHT and len(str(error).splitlines()) == 2
        return
    own = of_itself(kind)
    assert torch.equal(ours, own.sequences)
    if noted is not None:
        theirs = torch.stack(own.logits, 1)
        off = (noted.of(1, NEW) - theirs).abs().max() / theirs.abs().max()
        assert off < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "new"), [(home_made.ScaledFrom24, 40), (home_made.Window, 60)], ids=named
)
def test_a_long_answer_is_the_models_own_in_slots(kind, new, loaded, batch):
    """Where a change comes late, or what came early is forgotten; beyond what a call's columns are
    rounded up to."""
    whole, inputs = loaded(kind), batch("llava", 1)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    core = EngineCore(whole, Exits(whole, (3,)), DRAFTS, EngineConfig(slots=2, limit=512))
    handles = [core.add(Request(inputs, "lossless", options=options)) for _ in range(2)]
    core.run()
    own = whole.model.generate(**inputs, **options)
    for handle in handles:
        assert torch.equal(handle.result(timeout=0).output.sequences, own)


@pytest.mark.parametrize("kind", [home_made.Skips, *home_made.LAYERS], ids=named)
def test_what_would_be_wrong_at_its_exits_is_not_trained(kind, loaded, batch, tmp_path):
    config = TrainConfig(
        exit_kind="layer",
        depths=(3,),
        steps=1,
        batch_size=2,
        evaluate_every=1,
        max_new_tokens=3,
        adversarial=0.0,
    )
    inputs = batch("llava", 1)
    try:
        whole = loaded(kind)
        by_drafts(whole, inputs)
    except UnsupportedBackboneError:
        with pytest.raises(UnsupportedBackboneError) as caught:
            train(
                loaded(kind), fakes.Blip2FakeProcessor("llava"), fakes.examples(4), config, tmp_path
            )
        assert len(str(caught.value).splitlines()) == 2


def test_a_cap_a_slice_and_a_bias_are_what_was_written(loaded):
    whole = loaded(home_made.CappedAndBiased)
    family = whole.family
    assert (family.logit_scale, family.softcap) == pytest.approx((0.5, 7.25), rel=1e-6)
    assert family.logit_bias == "logits_bias"
    assert loaded(home_made.Sliced).vocabulary == 90
    assert loaded(home_made.TemperedALittle).family.logit_scale == pytest.approx(1.00003, abs=1e-7)


def test_what_a_head_reads_of_some_tokens_is_biased_alike(loaded):
    whole = loaded(home_made.CappedAndBiased)
    states, ids = torch.randn(3, whole.width), torch.tensor([5, 80, 9])
    some = whole.logits(states, whole.head_rows(ids))
    torch.testing.assert_close(some, whole.logits(states)[:, ids])


def test_exits_at_other_depths_are_checked_again(loaded, batch):
    """What joins again behind layer 3 is lost where a token comes back at depth 3 alone."""
    whole, inputs = loaded(home_made.Skips), batch("llava", 1)
    exits = Exits(whole, (2, 3))
    generate(whole, inputs, exits=exits, policy=ExitPolicy({2: 0.0}), **SOON)
    before = whole.readings.read
    made = generate(whole, inputs, exits=exits, policy=ExitPolicy({3: 0.0}), **SOON)
    assert whole.readings.read > before and whole.readings.failed
    assert torch.equal(made.sequences, whole.model.generate(**inputs, **SOON))


def test_more_than_two_exits_are_checked_together(loaded, batch):
    whole = loaded(home_made.Window)
    exits = Exits(whole, (1, 2, 3, 5))
    policy = ExitPolicy(dict.fromkeys(exits.depths, 0.02))
    generate(whole, batch("llava", 1), exits=exits, policy=policy, **SOON)
    assert (whole.readings.read, whole.readings.failed) == (1, 0)


def test_custom_generate_is_read_again_as_all_doors_are(batch):
    whole = Backbone(home_made.build(home_made.Window))  # registered: no example was needed
    adapter, inputs = attach(whole, Exits(whole, (3,))).with_policy(DRAFTS), batch("llava", 1)
    ours = whole.model.generate(**inputs, custom_generate=adapter, **SOON)
    assert torch.equal(ours, whole.model.generate(**inputs, **SOON))
    assert whole.readings.read == 1


def test_an_adapter_does_not_vouch_for_code_that_is_no_librarys(loaded, batch, tmp_path):
    whole, inputs = loaded(home_made.Window), batch("llava", 1)
    by_drafts(whole, inputs)
    Adapter(whole, Exits(whole, (3,)), DRAFTS).save(tmp_path / "exits")
    changed = loaded(home_made.Window)
    changed.stack.__class__ = home_made.Skips
    made = Adapter.load(tmp_path / "exits", changed).generate(**inputs, **SOON)
    assert torch.equal(made.sequences, changed.model.generate(**inputs, **SOON))


@pytest.mark.parametrize("kind", ["peft", "plain"])
def test_library_code_is_not_checked_again(kind, batch):
    model = home_made.families.build("llava")
    if kind == "peft":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert Backbone(model).tested
