"""The log probabilities of a token are those of what said it: its exit, or the whole model."""

from __future__ import annotations

import math
from typing import Any

import pytest
from engine import depths as depths_of
from engine import stored

from offramp_vllm.drafts import NAME

TOP = 5
FULL = {"offramp_mode": "full"}
Told = list[tuple[int, int, dict[int, float]]]
"""Of each token of an answer: its id, its depth, and the log probabilities by id."""


def ask(llm: Any, prompts: list[list[int]], new: int = 20, **params: Any) -> list[Told]:
    from vllm import SamplingParams

    wanted = SamplingParams(
        **{"temperature": 0.0, "max_tokens": new, "detokenize": False, "logprobs": TOP, **params}
    )
    found = []
    for made in llm.generate([{"prompt_token_ids": p} for p in prompts], wanted, use_tqdm=False):
        answer = made.outputs[0]
        told = [{at: one.logprob for at, one in all_.items()} for all_ in answer.logprobs]
        depths = depths_of(made)
        found.append([*zip(answer.token_ids, depths, told, strict=True)])
    return found


def test_an_exit_tells_its_own_and_the_model_its_own(made: Any, serve: Any) -> None:
    folder = made("llama")
    rows = stored(folder)[:8]
    llm = serve(folder / "model", folder / "export")
    told = ask(llm, [row["prompt"] for row in rows])
    assert [[token for token, _, _ in one] for one in told] == [row["tokens"] for row in rows]
    for depth, extra in ((2, {}), (6, FULL)):
        at = [
            (row["prompt"] + row["tokens"][:place], one[place])
            for row, one in zip(rows, told, strict=True)
            for place in range(1, len(one))
            if one[place][1] == depth
        ]
        again = ask(llm, [prompt for prompt, _ in at], new=1, extra_args=extra)
        assert at
        for (_, one), [alone] in zip(at, again, strict=True):
            assert alone[:2] == one[:2]
            assert alone[2] == pytest.approx(one[2], abs=1e-4)
            assert max(one[2], key=one[2].__getitem__) == one[0] and len(one[2]) == TOP


def test_an_exit_gives_only_tokens_of_its_shortlist(made: Any, serve: Any) -> None:
    folder = made("qwen3")
    rows = stored(folder)[:8]
    llm = serve(folder / "model", folder / "export", max_logprobs=-1)
    seen = set()
    for one in ask(llm, [row["prompt"] for row in rows], logprobs=-1):
        for _, depth, told in one:
            seen.add(depth)
            may = sorted(token for token, value in told.items() if value > -math.inf)
            assert (may == [*range(3, 512, 3)]) == (depth == 2)
            assert sum(map(math.exp, told.values())) == pytest.approx(1.0, abs=1e-4)
    assert seen == {2, 6}


@pytest.mark.parametrize(
    "params",
    [{"repetition_penalty": 1.3}, {"temperature": 0.8, "seed": 7, "presence_penalty": 0.5}],
    ids=["penalty", "seed"],
)
def test_penalties_and_seeds_leave_them_the_same_alone_and_together(
    params: dict[str, Any], made: Any, serve: Any
) -> None:
    folder = made("llama")
    prompts = [row["prompt"] for row in stored(folder)[:6]]
    llm = serve(folder / "model", folder / "export")
    together = ask(llm, prompts, **params)
    for prompt, one in zip(prompts, together, strict=True):
        [alone] = ask(llm, [prompt], **params)
        assert [row[:2] for row in alone] == [row[:2] for row in one]
        for mine, theirs in zip(alone, one, strict=True):
            assert mine[2] == pytest.approx(theirs[2], abs=1e-4)


def test_verified_drafts_have_the_full_models(made: Any, serve: Any) -> None:
    folder = made("llama")
    prompts = [row["prompt"] for row in stored(folder)[:6]]
    llm = serve(
        folder / "model",
        folder / "export",
        speculative_config={"model": NAME, "num_speculative_tokens": 3},
    )
    full, drafted = ask(llm, prompts, extra_args=FULL), ask(llm, prompts)
    for one, other in zip(full, drafted, strict=True):
        assert [token for token, _, _ in one] == [token for token, _, _ in other]
        for (_, _, mine), (_, _, theirs) in zip(one, other, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)
