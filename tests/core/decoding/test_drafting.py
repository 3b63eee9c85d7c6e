"""Exits that draft on from their own state: the same answers, in rounds of several tokens."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import families
import pytest
import torch
from families import NAMES, WORDLESS

from offramp.core.decoding.decoder import Decoder
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.engine.generate import generate
from offramp.core.executors.drafter import DraftingExit
from offramp.core.executors.slots.executor import SlotExecutor
from offramp.core.models.exits import Exits, ExitSet

GREEDY = {"max_new_tokens": 9, "do_sample": False}
LOSSLESS = ExitPolicy(lossless=True, max_draft=3, drafts={2: 0.0})


def drafting(whole, depths=(2,)):
    """Exits that are copies, and draft on as they were made."""
    return Exits(whole, depths, kind="drafting")


@pytest.fixture
def knows(monkeypatch):
    """`knows(full)`: drafts are what mostly follows in the answers of `full`; None: never."""

    def tell(full):
        following = {}
        if full is not None:
            for row in full.new_tokens.tolist():
                following |= dict(pairwise(row))
        fed, inputs, tokens = [], DraftingExit.inputs, DraftingExit.tokens

        def noted(self, ids, states):
            fed[:] = ids.tolist()
            return inputs(self, ids, states)

        def said(self, states):
            assert all(made.shape == (len(states),) for made in tokens(self, states))
            known = [following.get(token, 0) for token in fed] or [0] * len(states)
            fed.clear()  # after a prompt nothing is fed
            return torch.tensor(known), torch.ones(len(states))

        monkeypatch.setattr(DraftingExit, "inputs", noted)
        monkeypatch.setattr(DraftingExit, "tokens", said)

    return tell


def accepted(made):
    return sum(kept for _, kept in made.rounds)


def drafted(made):
    return sum(count for count, _ in made.rounds)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_output_is_the_full_models_whether_drafts_are_right_never_or_mostly(
    name, rows, backbone, batch, knows
):
    whole, inputs, depths = backbone(name), batch(name, rows), families.depths(name)
    exits, policy = drafting(whole, depths), replace(LOSSLESS, drafts=dict.fromkeys(depths, 0.0))
    options = {**GREEDY, "suppress_tokens": WORDLESS}
    full = generate(whole, inputs, **options)
    made = generate(whole, inputs, exits=exits, policy=policy, **options)
    assert torch.equal(made.sequences, full.sequences)
    for told, least in ((None, 0), (full, 1)):
        knows(told)
        made = generate(whole, inputs, exits=exits, policy=policy, **options)
        assert torch.equal(made.sequences, full.sequences)
        assert drafted(made) and accepted(made) >= least


def test_a_first_draft_that_is_wrong_is_followed_by_others(backbone, batch, knows):
    whole, inputs = backbone("llava"), batch("llava", 1)
    knows(None)
    options = {**GREEDY, "suppress_tokens": WORDLESS}
    made = generate(whole, inputs, exits=drafting(whole), policy=LOSSLESS, **options)
    assert made.rounds[:4] == ((LOSSLESS.max_draft, 0),) * 4


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", ["llava", "blip2-opt", "qwen2-vl"])
def test_first_drafts_are_verified_with_the_prompt(name, rows, backbone, batch, monkeypatch):
    whole, inputs = backbone(name), batch(name, rows)
    columns, run = [], SlotExecutor.run

    def noted(self, segment, spans, asked):
        columns.append([end - first for _, first, end in spans])
        return run(self, segment, spans, asked)

    monkeypatch.setattr(SlotExecutor, "run", noted)
    full = generate(whole, inputs, **GREEDY)
    made = generate(whole, inputs, exits=drafting(whole), policy=LOSSLESS, **GREEDY)
    assert torch.equal(made.sequences, full.sequences)
    assert rows > 1 or len(columns) == len(made.rounds)
    assert min(columns[0]) > 1 + LOSSLESS.max_draft >= max(max(later) for later in columns[1:])


@pytest.mark.parametrize("name", ["llava", "blip2-opt", "blip2-t5", "qwen2-vl", "gemma3"])
def test_the_models_own_stack_drafts_the_same(name, backbone, batch, monkeypatch):
    whole, inputs = backbone(name), batch(name, 1)
    exits = drafting(whole)
    full = generate(whole, inputs, **GREEDY).sequences
    ours = generate(whole, inputs, exits=exits, policy=LOSSLESS, **GREEDY)
    monkeypatch.setattr(whole, "engine", "stack")
    theirs = generate(whole, inputs, exits=exits, policy=LOSSLESS, **GREEDY)
    assert torch.equal(theirs.sequences, full) and torch.equal(ours.sequences, full)
    assert theirs.rounds and ours.rounds


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("engine", ["slots", "stack"])
def test_drafts_go_on_while_the_product_of_their_probabilities_is_sure(
    engine, rows, backbone, batch, monkeypatch
):
    """Of rounds with room for more; what is drafted changes no token."""
    whole, inputs = backbone("llava"), batch("llava", rows)
    exits, tokens = drafting(whole), DraftingExit.tokens
    monkeypatch.setattr(whole, "engine", engine)

    def said(self, states):
        ids, shares = tokens(self, states)
        assert bool(((shares > 0) & (shares <= 1)).all())
        return ids, torch.full_like(shares, 0.5)

    monkeypatch.setattr(DraftingExit, "tokens", said)
    full = generate(whole, inputs, **GREEDY)
    for sure, most in ((0.125, 3), (0.2, 2), (0.6, 0)):
        policy = replace(LOSSLESS, drafts={2: sure})
        found = generate(whole, inputs, exits=exits, policy=policy, **GREEDY)
        assert torch.equal(found.sequences, full.sequences)
        assert max(count for count, _ in found.rounds) == most


def test_a_drafts_probability_is_the_softmax_of_what_it_can_say(backbone):
    whole, ids = backbone("llava"), torch.arange(0, 40, 2)
    states = torch.randn(5, whole.width)
    for shortlist, columns in ((True, ids), (False, torch.arange(whole.vocabulary))):
        policy = replace(LOSSLESS, shortlist=shortlist)
        drafter = DraftingExit.of(whole, ExitSet(drafting(whole), ids), policy)
        said, shares = drafter.tokens(states)
        expected = whole.logits(whole.final_norm(states))[:, columns].softmax(-1).max(-1)
        assert torch.equal(said, columns[expected.indices])
        torch.testing.assert_close(shares, expected.values)


@pytest.mark.parametrize("name", ["llava", "blip2-opt", "blip2-t5"])
def test_a_draft_is_what_the_layer_makes_of_token_and_state_without_a_cache(
    name, backbone, batch, monkeypatch
):
    """Against a slow loop: the exit over all its true entries, then over what drafts put in."""
    whole, inputs = backbone(name), batch(name, 1)
    exits = drafting(whole)
    with_cache = []
    tokens = DraftingExit.tokens
    monkeypatch.setattr(
        DraftingExit,
        "tokens",
        lambda self, states: with_cache.append(states.clone()) or tokens(self, states),
    )
    generate(whole, inputs, exits=exits, policy=LOSSLESS, **GREEDY)
    one_row = [states for states in with_cache if len(states) == 1]
    assert len(one_row) == len(with_cache) > 3
    with_cache.clear()
    double = {key: torch.cat([value, value]) for key, value in inputs.items()}
    generate(whole, double, exits=exits, policy=LOSSLESS, **GREEDY)
    for alone, both in zip(one_row, with_cache, strict=False):
        torch.testing.assert_close(both, alone.expand(2, -1), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_sample_is_the_full_models_of_that_seed(rows, backbone, batch, knows):
    whole, inputs = backbone("llava"), batch("llava", rows)
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 0.8, "seed": 3}
    full = generate(whole, inputs, **options)
    knows(full)
    made = generate(whole, inputs, exits=drafting(whole), policy=LOSSLESS, **options)
    assert torch.equal(made.sequences, full.sequences) and accepted(made) > 0


@pytest.mark.parametrize("rows", [1, 4])
def test_an_end_token_inside_a_draft_ends_the_answer(rows, backbone, batch, knows):
    whole, inputs = backbone("llava"), batch("llava", rows)
    long = generate(whole, inputs, **GREEDY)
    end = int(long.new_tokens[0, 5])
    options = {**GREEDY, "eos_token_id": end, "pad_token_id": 0}
    full = generate(whole, inputs, **options)
    knows(long)
    made = generate(whole, inputs, exits=drafting(whole), policy=LOSSLESS, **options)
    assert torch.equal(made.sequences, full.sequences)


@pytest.mark.parametrize("engine", ["slots", "stack"])
def test_nothing_is_drafted_behind_an_end_token(engine, backbone, batch, knows, monkeypatch):
    whole, inputs = backbone("llava"), batch("llava", 1)
    end = int(generate(whole, inputs, **GREEDY).new_tokens[0, 1])
    options = {**GREEDY, "eos_token_id": end}
    full = generate(whole, inputs, **options)
    knows(full)
    monkeypatch.setattr(whole, "engine", engine)
    made = generate(whole, inputs, exits=drafting(whole), policy=LOSSLESS, **options)
    assert torch.equal(made.sequences, full.sequences) and full.depths.numel() == 2
    assert made.rounds[-1] == (1, 1)


def test_no_more_is_drafted_than_the_answer_has_room_for(backbone, batch, knows):
    whole, inputs = backbone("llava"), batch("llava", 1)
    exits = drafting(whole)
    for most in (1, 2, 3, 5):
        full = generate(whole, inputs, max_new_tokens=most, do_sample=False)
        knows(full)
        made = generate(
            whole, inputs, exits=exits, policy=LOSSLESS, max_new_tokens=most, do_sample=False
        )
        assert torch.equal(made.sequences, full.sequences)
        assert all(count < most for count, _ in made.rounds)


def test_processors_are_asked_about_what_stands(backbone, batch, knows):
    whole, inputs = backbone("llava"), batch("llava", 1)
    for more in ({"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 8}):
        full = generate(whole, inputs, **GREEDY, **more)
        knows(full)
        made = generate(whole, inputs, exits=drafting(whole), policy=LOSSLESS, **GREEDY, **more)
        assert torch.equal(made.sequences, full.sequences)


def test_a_drafting_exit_is_a_copied_layer_and_saves_no_name_anew(backbone):
    whole = backbone("llava")
    plain, made = Exits(whole, (2,)).state_dict(), drafting(whole).state_dict()
    assert plain.keys() < made.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in plain.items())
    assert {name.split(".")[1] for name in made.keys() - plain.keys()} == {"drafts"}


def test_early_exit_of_drafting_exits_is_that_of_the_layer(backbone, batch):
    whole, inputs = backbone("llava"), batch("llava", 1)
    policy = ExitPolicy({2: 0.05})
    layer = generate(whole, inputs, exits=Exits(whole, (2,)), policy=policy, **GREEDY)
    ours = generate(whole, inputs, exits=drafting(whole), policy=policy, **GREEDY)
    assert torch.equal(ours.sequences, layer.sequences)
    assert torch.equal(ours.depths, layer.depths)


@pytest.mark.parametrize("kind", ["layer", "drafting"])
@pytest.mark.parametrize("trust", [None, 2.0, 0.0])
@pytest.mark.parametrize(("free", "rows", "most"), [(8, 1, 3), (8, 4, 1), (3, 4, 0), (None, 4, 3)])
def test_several_verified_sequences_draft_what_free_rows_hold(
    free, rows, most, trust, kind, backbone, batch, monkeypatch
):
    """What a trust may take is drafted whatever the load; no load changes an answer."""
    whole, inputs = backbone("llava"), batch("llava", rows)
    exits = Exits(whole, (2,), kind=kind)
    policy = replace(LOSSLESS, lossless=trust is None, trust=trust)
    options = {**GREEDY, "suppress_tokens": WORDLESS}  # no end token: all are verified
    budgets, budget = [], Decoder._budget

    def noted(self, row, *more):
        made = budget(self, row, *more)
        budgets.append((len(self.sequences), made.max_drafts))
        return made

    monkeypatch.setattr(Decoder, "_budget", noted)
    monkeypatch.setattr(SlotExecutor, "free_rows", free)
    made = generate(whole, inputs, exits=exits, policy=policy, **options)
    with torch.inference_mode():
        assert torch.equal(made.sequences, whole.model.generate(**inputs, **options))
    together = [count for sequences, count in budgets if sequences == rows]
    assert max(together) == (most if trust is None else LOSSLESS.max_draft)


def test_a_shortlist_bounds_what_is_drafted(backbone, batch, knows):
    whole, inputs = backbone("llava"), batch("llava", 1)
    ids = torch.arange(0, whole.vocabulary, 2)
    exits = ExitSet(drafting(whole), ids)
    full = generate(whole, inputs, **GREEDY)
    policy = replace(LOSSLESS, shortlist=True)
    drafter = DraftingExit.of(whole, exits, policy)
    assert set(drafter.tokens(torch.randn(50, whole.width))[0].tolist()) <= set(ids.tolist())
    made = generate(whole, inputs, exits=exits, policy=policy, **GREEDY)
    assert torch.equal(made.sequences, full.sequences)


def test_requests_of_all_modes_share_an_engine(backbone, batch, knows):
    """Drafting rows beside early exits and full depth: each gets what it gets alone."""
    from offramp.serving.core import EngineCore
    from offramp.serving.engine_config import EngineConfig
    from offramp.serving.request import Request

    whole = backbone("llava")
    exits = drafting(whole)
    policy = ExitPolicy({2: 0.05}, max_draft=3, drafts={2: 0.0})
    rows = [families.one_row("llava", batch("llava", 4), row) for row in range(4)]
    full = [generate(whole, row, **GREEDY) for row in rows]
    early = [generate(whole, row, exits=exits, policy=policy, **GREEDY) for row in rows]
    knows(full[0])
    core = EngineCore(whole, exits, policy, EngineConfig(slots=6, limit=64))
    asked = [
        (mode, row)
        for row in range(4)
        for mode in ("lossless", *(["early_exit", "full"] if row % 2 else []))
    ]
    handles = [core.add(Request(rows[row], mode, options=GREEDY)) for mode, row in asked]
    core.run()
    for (mode, row), handle in zip(asked, handles, strict=True):
        alone = early[row] if mode == "early_exit" else full[row]
        assert torch.equal(handle.result().output.sequences, alone.sequences), (mode, row)
    lossless = [h for (mode, _), h in zip(asked, handles, strict=True) if mode == "lossless"]
    assert sum(accepted(handle.result().output) for handle in lossless) > 0


@pytest.mark.parametrize("limit", [31, 32, 63])
def test_drafts_end_with_the_slot(limit, backbone, batch, knows):
    """Beside a sequence that may be drafted further, one that fills its slot to the last column."""
    from offramp.serving.core import EngineCore
    from offramp.serving.engine_config import EngineConfig
    from offramp.serving.request import Request

    whole = backbone("llava")
    exits = drafting(whole)
    rows = [families.one_row("llava", batch("llava", 2), row) for row in range(2)]
    room = limit - rows[0]["input_ids"].shape[1]
    full = [
        generate(whole, row, max_new_tokens=most, do_sample=False)
        for row, most in zip(rows, (room, room // 2), strict=True)
    ]
    knows(full[0])
    policy = ExitPolicy(max_draft=8, drafts={2: 0.0})
    core = EngineCore(whole, exits, policy, EngineConfig(slots=2, limit=limit))
    late = core.add(
        Request(rows[0], "lossless", options={"max_new_tokens": room, "do_sample": False})
    )
    core.round()
    while core.decoder.sequences and len(core.decoder.sequences[0].ids) < room - 12:
        core.round()
    other = core.add(
        Request(rows[1], "lossless", options={"max_new_tokens": room // 2, "do_sample": False})
    )
    core.run()
    for handle, expected in zip((late, other), full, strict=True):
        assert torch.equal(handle.result().output.sequences, expected.sequences)
