"""Exits learn to draft on: what is unrolled is what decoding does, and the layer stays."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import fakes
import pytest
import torch
import training_runs

from offramp.adapter.adapter import Adapter
from offramp.adapter.answers import full_model_answers
from offramp.core.decoding.policy import AHEAD, ExitPolicy
from offramp.core.engine.generate import generate
from offramp.core.errors import InputError
from offramp.core.executors.drafter import DraftingExit
from offramp.core.models.exits import Exits
from offramp.features.input_processor import InputProcessor
from offramp.features.teacher_forcing import record
from offramp.training.config import TrainConfig
from offramp.training.drafting import Acceptance, DraftingStage, roll_out
from offramp.training.feature_store import FeatureStore
from offramp.training.trainer import train, train_drafting

CONFIG = TrainConfig(
    depths=(2, 4),
    steps=8,
    batch_size=4,
    evaluate_every=4,
    max_new_tokens=8,
    validation_fraction=0.25,
    patience=None,
)
LOSSLESS = ExitPolicy(lossless=True, max_draft=3)


def answered(encoder, n, new=7):
    """Each alone."""
    return full_model_answers(encoder, fakes.examples(n), batch_size=1, max_new_tokens=new)


def processor(name):
    return fakes.Blip2FakeProcessor(name)


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-llama", "blip2-t5"])
def test_a_rollout_is_what_decoding_drafts(name, backbone, monkeypatch):
    """From the prompt's last token on, which the exit says too: states of drafts in training equal
    those in decoding."""
    whole = backbone(name)
    encoder = InputProcessor(whole, processor(name))
    [row] = answered(encoder, 1)
    exits = Exits(whole, (2,), kind="drafting")
    rollout = roll_out(whole, exits, record(encoder, [row], (2,)), 3)[2]
    states, step = [], count()

    def said(self, made):
        states.append(made.clone())
        return torch.tensor([row.ids[next(step)]]), torch.ones(1)

    monkeypatch.setattr(DraftingExit, "tokens", said)
    made = generate(
        whole,
        encoder.prompts([row.example]),
        exits=exits,
        policy=replace(LOSSLESS, max_draft=4),
        max_new_tokens=5,
        do_sample=False,
    )
    assert made.new_tokens[0].tolist() == list(row.ids[:5]) and made.rounds[0] == (4, 4)
    for k in range(3):
        torch.testing.assert_close(rollout.drafts[k][0, k], states[k + 1][0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5"])
def test_a_place_drafts_the_same_whatever_the_others_do(name, backbone):
    """A rollout over an answer, against one that begins at its place alone."""
    whole = backbone(name)
    encoder = InputProcessor(whole, processor(name))
    [row] = answered(encoder, 1)
    exits = Exits(whole, (2,), kind="drafting")
    long = roll_out(whole, exits, record(encoder, [row], (2,)), 2)[2]
    short = roll_out(whole, exits, record(encoder, [replace(row, ids=row.ids[:4])], (2,)), 2)[2]
    for k in range(2):
        torch.testing.assert_close(
            long.drafts[k][:, k:3], short.drafts[k][:, k:], atol=2e-5, rtol=1e-4
        )


@pytest.mark.slow
def test_only_the_inputs_of_drafts_learn(opt, tmp_path):
    config = training_runs.SHORT
    first = train(opt, processor("blip2-opt"), fakes.examples(12), config, tmp_path / "first")
    adapter = first.with_policy(ExitPolicy({2: 0.3}), {"kept": True})
    frozen = {n: t.clone() for n, t in opt.model.state_dict().items()}
    made = train_drafting(
        adapter, processor("blip2-opt"), fakes.examples(12), CONFIG, tmp_path / "second"
    )
    assert made.exits.modules.kind == "drafting"
    drafts = dict.fromkeys(made.exits.depths, AHEAD)
    assert made.policy == replace(adapter.policy, drafts=drafts, max_draft=4)
    assert made.calibration == {"kept": True}
    was, now = (a.exits.modules.state_dict() for a in (adapter, made))
    assert all(torch.equal(now[name], tensor) for name, tensor in was.items())
    fresh = Exits(opt, (2, 4), kind="drafting").state_dict()
    own = now.keys() - was.keys()
    assert own and all(not torch.equal(now[name], fresh[name]) for name in own)
    assert all(torch.equal(opt.model.state_dict()[n], t) for n, t in frozen.items())
    loaded = Adapter.load(tmp_path / "second", opt)
    assert training_runs.same(loaded.exits.modules.state_dict(), now)
    assert loaded.metrics["drafting"].keys() == {"2", "4"}


def test_training_raises_acceptance(backbone, tmp_path, caplog):
    caplog.set_level("INFO")
    whole = backbone("blip2-opt")
    encoder = InputProcessor(whole, processor("blip2-opt"))
    store = FeatureStore(encoder, answered(encoder, 8), (4,), batch_size=4)
    store.fill()
    exits = Exits(whole, (4,))
    config = replace(CONFIG, depths=(4,), steps=40, evaluate_every=20, learning_rate=1e-2)
    run = training_runs.trainer(whole, tmp_path, config)
    stage = DraftingStage(Adapter(whole, exits), config, run.accelerator)
    with torch.no_grad():
        before = stage.loss(store[0]).item()
    made = stage.run((store, store))
    shown = made.metrics["drafting"]["4"]
    assert f"right ones: {shown['acceptance'][0]:.0%}" in caplog.text
    with torch.no_grad():
        assert stage.loss(store[0]).item() < 0.8 * before
    assert shown["drafts"] > 20 and 0 < shown["acceptance"][0] <= 1
    assert shown["first_draft"] > 0


def test_a_dip_ends_no_stage(backbone, tmp_path, monkeypatch):
    """Drafts are right less often while the rate is high: all steps count, the best are kept."""
    whole = backbone("blip2-opt")
    encoder = InputProcessor(whole, processor("blip2-opt"))
    store = FeatureStore(encoder, answered(encoder, 4), (4,), batch_size=4)
    store.fill()
    config = replace(CONFIG, depths=(4,), steps=6, evaluate_every=2, patience=1)
    run = training_runs.trainer(whole, tmp_path, config)
    stage, steps = DraftingStage(Adapter(whole, Exits(whole, (4,))), config, run.accelerator), []
    found = iter([8, 3, 2, 9])  # before the first step, and at each validation
    monkeypatch.setattr(stage, "measure", lambda _: {4: Acceptance([10] * 6, [next(found)] * 6)})
    monkeypatch.setattr(stage, "_step", lambda batch, optimizer, step: steps.append(step))
    assert stage.follow((store, store))[4].right[0] == 9 and steps == [*range(6)]


def test_train_of_that_kind_has_both_stages(opt, tmp_path):
    config = replace(CONFIG, exit_kind="drafting")
    made = train(opt, processor("blip2-opt"), fakes.examples(12), config, tmp_path)
    assert made.exits.draft_on and set(made.metrics) >= {"agreement", "drafting"}
    assert made.provenance["config"]["exit_kind"] == "drafting"
    whole = generate(
        opt,
        InputProcessor(opt, processor("blip2-opt")).prompts(fakes.examples(1)),
        max_new_tokens=6,
        do_sample=False,
    )
    prompt = InputProcessor(opt, processor("blip2-opt")).prompts(fakes.examples(1))
    ours = made.generate(prompt, mode="lossless", max_new_tokens=6, do_sample=False)
    assert torch.equal(ours.sequences, whole.sequences) and ours.rounds


def test_exits_that_draft_go_on_from_what_they_know(opt, tmp_path):
    """Taught again for a step of a rate of next to nothing, they draft as they did."""
    config = replace(CONFIG, exit_kind="drafting")
    before = train(opt, processor("blip2-opt"), fakes.examples(12), config, tmp_path / "first")
    still = replace(config, steps=1, learning_rate=1e-9)
    after = train_drafting(
        before, processor("blip2-opt"), fakes.examples(12, seed=1), still, tmp_path / "second"
    )
    was, now = (made.exits.modules.state_dict() for made in (before, after))
    for name, tensor in was.items():
        torch.testing.assert_close(now[name], tensor, atol=1e-6, rtol=0)


def test_other_exits_are_refused(opt, tmp_path):
    lens = Adapter(opt, Exits(opt, (2,), kind="lens"))
    with pytest.raises(InputError, match="cannot learn to draft on"):
        DraftingStage(lens, CONFIG, training_runs.trainer(opt, tmp_path, CONFIG).accelerator)
