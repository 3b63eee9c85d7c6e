"""Law of compiled decoding with inductor's code and frozen weights: the same tokens and scores."""

from __future__ import annotations

import pytest
import torch
from compiling import two_layers

from offramp.engine.generate import generate
from offramp.engine.policy import ExitPolicy
from offramp.models.compile import _missing, compiled

GREEDY = {"max_new_tokens": 6, "do_sample": False}


def test_code_made_by_inductor_exits_at_the_same_depths() -> None:
    whole, parts, inputs = two_layers("mini-llava")
    if reason := _missing(whole):
        pytest.skip(f"no C++ compiler here ({reason})")
    policy = ExitPolicy({1: 0.002})
    eager = generate(whole, inputs, exits=parts, policy=policy, **GREEDY)
    with compiled(whole, parts):
        ours = generate(whole, inputs, exits=parts, policy=policy, **GREEDY)
    assert torch.equal(ours.sequences, eager.sequences)
    torch.testing.assert_close(ours.scores, eager.scores, equal_nan=True, atol=1e-4, rtol=1e-3)
