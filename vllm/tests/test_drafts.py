"""Lossless answers: an exit as draft model, beside early exits in one server."""

from __future__ import annotations

from typing import Any

import pytest

from engine import answers, stored
from offramp_vllm.drafts import NAME


@pytest.fixture(params=["draft_model", "exit"])
def drafting(request: pytest.FixtureRequest, made: Any, serve: Any) -> Any:
    """A server of the tiny Llama with drafts, by another checkpoint or by its own exit."""
    folder = made("llama")
    speculative = {"method": "draft_model", "model": str(folder / "draft")}
    if request.param == "exit":
        speculative = {"model": NAME}
    return serve(
        folder / "model", folder / "export", disable_log_stats=False,
        speculative_config={**speculative, "num_speculative_tokens": 3},
    )  # fmt: skip


def accepted(llm: Any) -> tuple[int, int]:
    """Drafts so far, and those that were kept."""
    found = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
    return (
        found["vllm:spec_decode_num_draft_tokens"], found["vllm:spec_decode_num_accepted_tokens"]
    )  # fmt: skip


def test_an_exit_drafts_and_the_answers_are_the_full_models(made: Any, drafting: Any) -> None:
    full, llm = stored(made("llama"), "full"), drafting
    for at_once in (1, 8, 24):
        got = answers(llm, [row["prompt"] for row in full], at_once=at_once)
        assert [one[0] for one in got] == [row["tokens"] for row in full]
    drafted, kept = accepted(llm)
    assert drafted > 0 and kept > 0


def test_early_answers_get_no_drafts_and_stay_offramps(made: Any, drafting: Any) -> None:
    from vllm import SamplingParams

    folder, llm = made("llama"), drafting
    early, full = stored(folder), stored(folder, "full")
    got = answers(llm, [row["prompt"] for row in early], extra_args={"offramp_mode": "early_exit"})
    assert [one[0] for one in got] == [row["tokens"] for row in early]
    assert [one[1] for one in got] == [row["depths"] for row in early]
    assert accepted(llm)[1] == 0
    modes = ("early_exit", "lossless", "full")
    params = [
        SamplingParams(temperature=0.0, max_tokens=20, detokenize=False,
                       extra_args={"offramp_mode": mode})
        for _ in early for mode in modes
    ]  # fmt: skip
    asked = [{"prompt_token_ids": row["prompt"]} for row in early for _ in modes]
    mixed = [list(m.outputs[0].token_ids) for m in llm.generate(asked, params, use_tqdm=False)]
    assert mixed[0::3] == [row["tokens"] for row in early]
    assert mixed[1::3] == mixed[2::3] == [row["tokens"] for row in full]
