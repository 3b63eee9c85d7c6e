"""Exits with vLLM's defaults: parts of the decoder are compiled, and answers are the same."""

from __future__ import annotations

from typing import Any

import pytest
from engine import answers, stored
from test_exactness import FULL, expect, prompts

FAMILIES = ("llama", "qwen3", "opt", "gemma2", "granite", "glm4", "cohere", "mistral")


@pytest.mark.parametrize("name", FAMILIES)
def test_compiled_parts_answer_as_offramp_alone_and_together(
    name: str, made: Any, serve: Any
) -> None:
    folder = made(name)
    early, full = stored(folder), stored(folder, "full")
    llm = serve(folder / "model", folder / "export", enforce_eager=False)
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.model_runner
    parts = runner.early.stages.compiled
    assert not runner.early.is_to_compile
    before = {part.name for part in parts._parts}
    assert len(before) == (5 if name == "llama" else 3)
    for at_once in (1, 8, 24):
        expect(answers(llm, prompts(early), at_once=at_once), early)
    expect(answers(llm, prompts(full), extra_args=FULL), full)
    assert {part.name for part in parts._parts} == before  # nothing is compiled while requests wait
