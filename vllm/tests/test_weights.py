"""Exits of plain weights beside quantised layers, and beside LoRA adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import answers, stored
from quantise import FORMS, quantise
from test_exactness import FULL, expect, prompts

IN_FLOAT32 = "int8", "fp8"


@pytest.mark.parametrize("form", FORMS)
def test_quantised_layers_answer_as_the_same_vllm_without_exits(
    form: str, made: Any, serve: Any, tmp_path: Path
) -> None:
    import vllm._custom_ops  # noqa: F401

    if form not in IN_FLOAT32 and not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        pytest.skip("vLLM's kernels for 4 bits want AVX-512")
    folder = made("llama")
    rows = prompts(stored(folder))
    model = quantise(folder / "model", form, tmp_path / "model")
    dtype = "float32" if form in IN_FLOAT32 else "bfloat16"
    plain = [tokens for tokens, _ in answers(serve(model, dtype=dtype), rows, at_once=8)]
    llm = serve(model, folder / "export", dtype=dtype)
    early = answers(llm, rows, at_once=1)
    for at_once in (8, 24):
        assert answers(llm, rows, at_once=at_once) == early
    assert {depth for _, depths in early for depth in depths} == {2, 4, 6}
    full = answers(llm, rows, at_once=8, extra_args=FULL)
    strict = answers(llm, rows, at_once=8, extra_args={"offramp_threshold": 1.0})
    assert [one[0] for one in full] == [one[0] for one in strict] == plain


def test_adapters_in_one_batch_answer_as_the_models_they_are_merged_into(
    made: Any, serve: Any
) -> None:
    from vllm.lora.request import LoRARequest

    from vllm import SamplingParams

    folder = made("llama")
    llm = serve(folder / "model", folder / "export", enable_lora=True, max_loras=2, max_lora_rank=8)
    expect(answers(llm, prompts(stored(folder))), stored(folder))
    names = "one", "two"
    asked = {name: LoRARequest(name, at, str(folder / name)) for at, name in enumerate(names, 1)}
    for mode in ("early_exit", "full"):
        rows = {
            name: json.loads((folder / name / "answers.json").read_text())[mode] for name in names
        }
        params = SamplingParams(
            temperature=0.0, max_tokens=20, detokenize=False, extra_args={"offramp_mode": mode}
        )
        pairs = [
            (name, row)
            for both in zip(*rows.values(), strict=True)
            for name, row in zip(names, both, strict=True)
        ]
        for at_once in (1, 8, 48):
            got = []
            for start in range(0, len(pairs), at_once):
                few = pairs[start : start + at_once]
                got += llm.generate(
                    [{"prompt_token_ids": row["prompt"]} for _, row in few],
                    params,
                    lora_request=[asked[name] for name, _ in few],
                    use_tqdm=False,
                )
            told = [(list(m.outputs[0].token_ids), m.outputs[0].offramp_depths) for m in got]
            expect(told, [row for _, row in pairs])
