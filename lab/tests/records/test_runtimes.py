"""Answers that a benchmark keeps come back as they were given, and are asked for once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gguf_cases import GREEDY, adapter_of, inputs_of

from offramp.engine.policy import FULL
from offramp_lab.records.runtimes.kept import Kept, KeptRuntime

NAME = "llava"


class Counted:
    """Hands on to an adapter and counts."""

    name, rows, asked = "counted", 1, 0

    def generate(self, inputs: Any, **options: Any) -> Any:
        self.asked += 1
        return adapter_of(NAME).generate(inputs, **options)


def test_what_is_kept_is_what_was_given(tmp_path: Path) -> None:
    model, policies = Counted(), (FULL, adapter_of(NAME).policy)
    for _ in range(2):  # the second time from the file alone
        kept = KeptRuntime(model, model.name, 6, Kept(tmp_path / "kept.jsonl"))
        for seed in range(2):
            for policy in policies:
                inputs = inputs_of(NAME, seed)
                ours = kept.generate(inputs, policy=policy, **GREEDY)
                theirs = adapter_of(NAME).generate(inputs, policy=policy, **GREEDY)
                assert torch.equal(ours.sequences, theirs.sequences)
                assert torch.equal(ours.depths, theirs.depths)
                torch.testing.assert_close(
                    ours.scores.float(), theirs.scores.float(), equal_nan=True
                )
    assert model.asked == 4
