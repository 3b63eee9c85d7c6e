"""Laws of guesses: answers are those of the thresholds alone, and deep layers run less often."""

from __future__ import annotations

import pytest
import torch
from decoding import agreeing, tokens_by_layer
from families import NAMES, WORDLESS

from offramp.engine.generate import generate
from offramp.engine.policy import ExitPolicy
from offramp.models.exits import Exits

GREEDY = {"max_new_tokens": 12, "do_sample": False, "suppress_tokens": WORDLESS}


def half(whole, parts, inputs, depth):
    """A threshold that some of the tokens reach and some do not."""
    threshold = 1.0
    for _ in range(4):
        policy = ExitPolicy({depth: threshold})
        made = generate(whole, inputs, exits=parts, policy=policy, **GREEDY)
        if len(made.depths.unique()) == 2:
            break
        threshold = float(made.scores.nanmedian())
    return threshold


def assert_same(ours, plain):
    assert torch.equal(ours.sequences, plain.sequences)
    assert torch.equal(ours.depths, plain.depths)
    torch.testing.assert_close(ours.scores, plain.scores, equal_nan=True, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_depths_and_scores_are_those_without_guesses(name, backbone, exits, batch):
    whole, parts, inputs = backbone(name), exits(name), batch(name, 1)
    depth = parts.depths[0]
    policy = ExitPolicy({depth: half(whole, parts, inputs, depth)})
    plain = generate(whole, inputs, exits=parts, policy=policy, **GREEDY)
    assert len(plain.depths.unique()) == 2
    guessing = ExitPolicy(policy.thresholds, guesses={depth: 0.0})
    assert_same(generate(whole, inputs, exits=parts, policy=guessing, **GREEDY), plain)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"min_new_tokens": 8, "eos_token_id": list(range(8, 40)), "pad_token_id": 0},
        {"stopping_criteria": [lambda ids, _: ids[:, -1] > 60]},
    ],
)
def test_rules_of_what_may_come_see_the_same_text(options, backbone, exits, batch):
    whole, parts, inputs = backbone("blip2-opt"), exits("blip2-opt"), batch("blip2-opt", 1)
    depth = parts.depths[0]
    policy = ExitPolicy({depth: half(whole, parts, inputs, depth)})
    plain = generate(whole, inputs, exits=parts, policy=policy, **GREEDY, **options)
    guessing = ExitPolicy(policy.thresholds, guesses={depth: 0.0})
    assert_same(generate(whole, inputs, exits=parts, policy=guessing, **GREEDY, **options), plain)


def test_right_guesses_share_a_call_of_the_layers_above(backbone, batch):
    """An exit that always says what the full model does, and is never confident."""
    whole, inputs = backbone("llava"), batch("llava", 1)
    depth = whole.depth - 1
    agreeing, calls = Exits(whole, (depth,)), []
    handle = whole.layers[-1].register_forward_hook(lambda *_: calls.append(1))
    try:
        for guesses in ({}, {depth: 0.0}):
            del calls[:]
            policy = ExitPolicy({depth: 1.0}, guesses=guesses)
            generate(whole, inputs, exits=agreeing, policy=policy, **GREEDY)
            if guesses:
                assert len(calls) == 1 + 2  # the prompt, and eleven tokens in sixes
            else:
                assert len(calls) == 12
    finally:
        handle.remove()


def test_a_guess_is_streamed_only_once_it_is_confirmed(backbone, exits, batch):
    whole, parts, inputs = backbone("llava"), exits("llava"), batch("llava", 1)
    depth = parts.depths[0]

    class Streamer:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    heard = Streamer()
    policy = ExitPolicy({depth: half(whole, parts, inputs, depth)}, guesses={depth: 0.0})
    made = generate(whole, inputs, exits=parts, policy=policy, streamer=heard, **GREEDY)
    assert heard.tokens == [*made.sequences[0].tolist(), "end"]


@pytest.mark.parametrize("case", ["rows", "sampled", "two exits"])
def test_elsewhere_they_mean_nothing(case, backbone, exits, batch):
    whole, parts = backbone("llava"), exits("llava")
    inputs = batch("llava", 4 if case == "rows" else 1)
    thresholds = dict.fromkeys(parts.depths if case == "two exits" else parts.depths[:1], 0.03)
    options = {**GREEDY, "do_sample": case == "sampled"}
    made = []
    for guesses in ({}, dict.fromkeys(thresholds, 0.0)):
        torch.default_generator.manual_seed(1)
        policy = ExitPolicy(thresholds, guesses=guesses)
        made.append(generate(whole, inputs, exits=parts, policy=policy, **options))
    assert_same(*made)


def test_a_first_token_out_of_the_prompt_keeps_the_prompt_pending(backbone, exits, batch):
    whole, parts, inputs = backbone("llava"), exits("llava"), batch("llava", 1)
    depth = parts.depths[0]
    threshold = half(whole, parts, inputs, depth)
    made = []
    for guesses in ({}, {depth: 0.0}):
        policy = ExitPolicy({depth: threshold}, guesses=guesses, exit_in_prefill=True)
        made.append(generate(whole, inputs, exits=parts, policy=policy, **GREEDY))
    assert_same(*made)


@pytest.mark.parametrize("first", [0.0, 1.0], ids=["guessed", "exited"])
def test_nothing_is_fed_behind_the_last_token(first, backbone, batch, scored):
    """Whether it was guessed, or exited behind a guess."""
    whole, inputs = backbone("llava"), batch("llava", 1)
    parts, turns = agreeing(whole), []

    def by_turns(logits):
        turns.append(first if len(turns) % 2 == 0 else 1.0 - first)
        return torch.full(logits.shape[:-1], turns[-1])

    scored(by_turns)
    depth = parts.depths[0]
    policy = ExitPolicy({depth: 0.5}, guesses={depth: 0.0})
    made, counts = tokens_by_layer(
        whole, lambda: generate(whole, inputs, exits=parts, policy=policy, **GREEDY)
    )
    assert made.new_tokens.shape[1] == 12 and len(set(turns)) == 2
    assert counts[0] == inputs["input_ids"].shape[1] + 12 - 1
