"""Drafts that end an answer are taken by the product of their probabilities, or verified."""

from __future__ import annotations

import math
from dataclasses import replace

import families
import pytest
import torch
from families import NAMES, WORDLESS

from offramp.core.decoding.drafting import DRAFTERS
from offramp.core.decoding.policy import ExitPolicy, policy_from_json, policy_to_json
from offramp.core.engine.generate import generate
from offramp.core.errors import InputError
from offramp.core.executors.drafter import DraftingExit
from offramp.core.executors.slots.running import SlotRunner
from offramp.core.models.exits import Exits
from offramp.features.text_drafts import TextDrafts

ENDS = [*range(0, families.VOCABULARY, 3)]
"""End tokens, so many that untrained models soon say one."""
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": ENDS, "pad_token_id": 0}
TRUST = ExitPolicy(trust=2.0, max_draft=12, drafts={2: 0.5})
KINDS = ("layer", "drafting")


def exits_of(whole, kind, depths=(2,)):
    return Exits(whole, depths, kind=kind)


def policy_at(trust, depths=(2,)):
    return replace(TRUST, trust=trust, drafts=dict.fromkeys(depths, 0.5))


def greedy(whole, inputs, **options):
    """What the model's own generate says."""
    with torch.inference_mode():
        return whole.model.generate(**inputs, **{**GREEDY, **options})


def padded(rows, length):
    return torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])


@pytest.fixture
def ends_at_once(monkeypatch):
    """The drafting exit says an end token, of which it is certain."""

    def said(self, states):
        return torch.full((len(states),), ENDS[1]), torch.ones(len(states))

    monkeypatch.setattr(DraftingExit, "tokens", said)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_above_one_the_answer_is_the_full_models(name, rows, kind, backbone, batch):
    whole, inputs, depths = backbone(name), batch(name, rows), families.depths(name)[:1]
    options = {"suppress_tokens": None} if kind == "layer" else {"suppress_tokens": WORDLESS}
    made = generate(
        whole,
        inputs,
        exits=exits_of(whole, kind, depths),
        policy=policy_at(1.5, depths),
        **GREEDY,
        **options,
    )
    full = greedy(whole, inputs, **options)
    assert torch.equal(made.sequences, full[:, full.shape[1] - made.sequences.shape[1] :])
    assert set(made.depths[made.depths > 0].tolist()) == {whole.depth}


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", ["llava", "blip2-opt", "blip2-t5", "qwen2-vl", "gemma3"])
def test_at_nought_plain_exits_write_what_they_write_at_a_threshold_of_nought(
    name, rows, backbone, batch
):
    """Of answers that end by themselves: nothing is ever verified."""
    whole, inputs = backbone(name), batch(name, rows)
    exits, options = exits_of(whole, "layer"), {**GREEDY, "max_new_tokens": 60}
    taken = generate(
        whole, inputs, exits=exits, policy=replace(TRUST, trust=0.0, max_draft=60), **options
    )
    early = generate(whole, inputs, exits=exits, policy=ExitPolicy({2: 0.0}), **options)
    assert torch.equal(taken.sequences, early.sequences)
    assert torch.equal(taken.depths, early.depths) and not taken.rounds


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llava", "blip2-opt"])
def test_what_nobody_verifies_runs_no_deep_layer(name, kind, backbone, batch, monkeypatch):
    """Not of the prompt either."""
    whole, inputs = backbone(name), batch(name, 1)
    ran, run_layers = [], SlotRunner.run_layers

    def noted(self, running, *args, **kw):
        ran.append(running)
        return run_layers(self, running, *args, **kw)

    monkeypatch.setattr(SlotRunner, "run_layers", noted)
    options = {**GREEDY, "max_new_tokens": 60}
    for trust, deep in ((0.0, False), (2.0, True)):
        ran.clear()
        policy = replace(TRUST, trust=trust, max_draft=60)
        made = generate(whole, inputs, exits=exits_of(whole, kind), policy=policy, **options)
        assert any(running.stop > 2 for running in ran) is deep
        assert set(made.depths.flatten().tolist()) == {whole.depth if deep else 2}


@pytest.mark.parametrize("engine", ["slots", "stack"])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llava", "blip2-opt", "blip2-t5"])
def test_one_run_that_takes_nothing_says_what_is_taken_at_any_level(
    name, kind, rows, engine, backbone, batch, monkeypatch
):
    """The first draft that ended the answer with enough; so changed answers are nested."""
    whole, inputs = backbone(name), batch(name, rows)
    monkeypatch.setattr(whole, "engine", engine)
    exits = exits_of(whole, kind)
    lossless = generate(whole, inputs, exits=exits, policy=TRUST, **GREEDY)
    assert any(lossless.offers) or lossless.new_tokens.shape[1] == 1
    # Just below each: beside others a product may round otherwise.
    products = sorted({0.999 * product for row in lossless.offers for product, _ in row})
    before, changed = lossless.new_tokens.tolist(), set()
    for level in (2.0, *products[:: -max(1, -(-len(products) // 3))], 0.0):
        made = generate(whole, inputs, exits=exits, policy=replace(TRUST, trust=level), **GREEDY)
        expected = [
            next((ids for product, ids in row if product >= level), own)
            for row, own in zip(lossless.offers, before, strict=True)
        ]
        length = made.new_tokens.shape[1]
        assert torch.equal(made.new_tokens, padded([r[:length] for r in expected], length))
        now = {
            row
            for row, (ids, own) in enumerate(zip(expected, before, strict=True))
            if [*ids] != own[: len(ids)]
        }
        assert changed <= now
        changed = now


@pytest.mark.parametrize("engine", ["slots", "stack"])
def test_drafts_are_taken_from_their_product_on(engine, backbone, batch, monkeypatch):
    """Of two drafts of a half each, the second of which ends the answer, a quarter."""
    whole, inputs = backbone("llava"), batch("llava", 1)
    monkeypatch.setattr(whole, "engine", engine)
    first = int(greedy(whole, inputs, eos_token_id=families.EOS)[0, -12])
    words = iter([first, ENDS[1]] * 40)
    if engine == "stack":  # the full model says the first
        words = iter([first + 1, ENDS[1]] * 40)

    def said(self, states):
        return torch.tensor([next(words)]), torch.full((1,), 0.5)

    monkeypatch.setattr(DraftingExit, "tokens", said)
    options = {**GREEDY, "eos_token_id": ENDS[1]}
    for trust, taken in ((0.25, True), (0.26, False)):
        made = generate(
            whole,
            inputs,
            exits=exits_of(whole, "drafting"),
            policy=replace(TRUST, trust=trust),
            **options,
        )
        assert (not made.rounds) is taken
        if taken:
            assert made.new_tokens[0, -1] == ENDS[1]
            assert made.depths[0, -2:].tolist() == [2, 2]
            assert made.scores[0, -2:].tolist() == [0.25, 0.25]


class Stops:
    """A criterion that never ends an answer."""

    def __call__(self, ids, scores, **_):
        return torch.zeros(len(ids), dtype=torch.bool)


@pytest.mark.parametrize(
    "more",
    [
        {"do_sample": True, "temperature": 0.8, "seed": 3},
        {"repetition_penalty": 1.7},
        {"min_new_tokens": 8},
        {"suppress_tokens": WORDLESS},
        {"stopping_criteria": [Stops()]},
        {"observer": lambda row, place, logits: None},
    ],
    ids=lambda more: next(iter(more)),
)
@pytest.mark.parametrize("rows", [1, 4])
def test_what_is_not_plainly_greedy_is_verified(more, rows, backbone, batch, ends_at_once):
    """Sampling, processors, criteria and whoever looks at logits: the full model's answer."""
    whole, inputs = backbone("llava"), batch("llava", rows)
    options = {**GREEDY, **more}
    full = generate(whole, inputs, **options)
    made = generate(
        whole,
        inputs,
        exits=exits_of(whole, "drafting"),
        policy=replace(TRUST, trust=0.0),
        **options,
    )
    assert torch.equal(made.sequences, full.sequences)
    plain = generate(
        whole, inputs, exits=exits_of(whole, "drafting"), policy=replace(TRUST, trust=0.0), **GREEDY
    )
    assert set(plain.new_tokens.flatten().tolist()) == {ENDS[1]}


def test_drafters_that_say_no_probability_are_never_taken(backbone, batch, monkeypatch):
    whole, inputs = backbone("llava"), batch("llava", 2)
    monkeypatch.setitem(
        DRAFTERS, "ends", lambda executor, depth: TextDrafts(executor, depth, lambda *_: [ENDS[1]])
    )
    policy = ExitPolicy(trust=0.0, drafts={"ends": 0.0})
    made = generate(whole, inputs, policy=policy, **GREEDY)
    assert torch.equal(made.sequences, greedy(whole, inputs)) and made.rounds


def test_an_answer_that_its_length_ends_is_verified(backbone, batch, ends_at_once):
    whole, inputs = backbone("llava"), batch("llava", 1)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": families.EOS}
    full = generate(whole, inputs, **options)
    made = generate(
        whole,
        inputs,
        exits=exits_of(whole, "drafting"),
        policy=replace(TRUST, trust=0.0),
        **options,
    )
    assert torch.equal(made.sequences, full.sequences) and full.depths.numel() == 5


def test_who_only_listens_changes_nothing(backbone, batch, ends_at_once):
    """Such as who notes when the first token is there."""
    from offramp.evaluation.timing import FirstToken

    whole, inputs, heard = backbone("llava"), batch("llava", 1), FirstToken()
    options = {**GREEDY, "stopping_criteria": [heard]}
    made = generate(
        whole,
        inputs,
        exits=exits_of(whole, "drafting"),
        policy=replace(TRUST, trust=0.0),
        **options,
    )
    assert made.new_tokens.tolist() == [[ENDS[1]]] and heard.heard


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_batch_engine_each_gets_what_it_gets_alone(kind, backbone, batch):
    from offramp.serving.core import EngineCore
    from offramp.serving.engine_config import EngineConfig
    from offramp.serving.request import Request

    whole = backbone("llava")
    exits, level = exits_of(whole, kind), 1e-3
    policy = replace(TRUST, trust=level)
    rows = [families.one_row("llava", batch("llava", 4), row) for row in range(4)]
    core = EngineCore(whole, exits, policy, EngineConfig(slots=3, limit=64))
    asked = [(mode, row) for row in range(4) for mode in (None, "lossless", "full")]
    handles = [core.add(Request(rows[row], mode, options=GREEDY)) for mode, row in asked]
    core.run()
    for (mode, row), handle in zip(asked, handles, strict=True):
        by = policy if mode is None else policy.in_mode(mode)
        alone = generate(whole, rows[row], exits=exits, policy=by, **GREEDY)
        got = handle.result().output
        assert torch.equal(got.sequences, alone.sequences), (mode, row)
        assert torch.equal(got.depths, alone.depths), (mode, row)


def test_a_request_may_ask_for_other_modes_or_thresholds():
    policy = ExitPolicy({2: 0.9}, trust=0.4)
    assert policy.own_mode == "early_exit" and policy.asked(None, None, (2,)) == policy
    assert policy.asked("lossless", None, (2,)).lossless
    assert policy.asked(None, {2: 0.5}, (2,)) == ExitPolicy({2: 0.5})
    assert ExitPolicy(trust=0.4, drafts={2: 0.1}).asked("early_exit", None, (2,)).trust == 0.4


@pytest.mark.parametrize("wrong", [-0.1, math.nan, math.inf, "0.4", True])
def test_a_trust_that_is_no_number_from_nought_is_refused(wrong):
    with pytest.raises(InputError, match=r"A trust of .* is no number from 0\.\nGive"):
        ExitPolicy(trust=wrong)


def test_a_policy_with_trust_comes_back_and_others_are_written_as_before():
    for policy in (ExitPolicy(trust=0.4, drafts={2: 0.0}, max_draft=30), ExitPolicy({2: 0.4})):
        written = policy_to_json(policy)
        assert policy_from_json(written) == policy
        assert ("trust" in written) is (policy.trust is not None)
