"""EAGLE-3's drafts at work: the full model's answers, however many are written at once."""

from __future__ import annotations

import pytest
import tiny_families
import torch
from offramp_vllm.exports.eagle3 import Eagle3Drafter

from offramp.core.decoding.policy import FULL, ExitPolicy
from offramp.serving.core import EngineCore
from offramp.serving.engine_config import EngineConfig
from offramp.serving.request import Request
from offramp_lab.methods.eagle import NAME, attached


@pytest.mark.parametrize("at_once", [1, 3])
def test_answers_are_the_full_models_and_drafts_are_asked(backbone, at_once: int) -> None:
    whole = backbone("llava")
    prompts = [tiny_families.KINDS["llava"].inputs(1, seed) for seed in range(3)]
    drafter = Eagle3Drafter(whole, torch.arange(whole.vocabulary))
    eagle = ExitPolicy(lossless=True, drafts={NAME: 0.0}, max_draft=3)
    told = {}
    with attached(whole, drafter, at_once, 64):
        for mode, policy in (("full", FULL), ("lossless", eagle)):
            core = EngineCore(whole, None, policy, EngineConfig(slots=at_once, limit=64))
            options = {"max_new_tokens": 12, "do_sample": False}
            handles = [core.add(Request(one, mode, options=options)) for one in prompts]
            core.run()
            told[mode] = [handle.result().output for handle in handles]
    for full, ours in zip(told["full"], told["lossless"], strict=True):
        assert torch.equal(full.sequences, ours.sequences)
        assert sum(drafted for drafted, _ in ours.rounds) > 0
