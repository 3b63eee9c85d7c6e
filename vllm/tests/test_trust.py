"""Early answers by trust: drafts that end an answer are taken unverified."""

from __future__ import annotations

from typing import Any

import pytest
from engine import answers, stored

from offramp_vllm.drafts import NAME

EARLY = {"offramp_mode": "early_exit"}


@pytest.fixture(params=["ends", "ends_on"])
def name(request: pytest.FixtureRequest) -> str:
    """A model whose exit drafts behind the layers below it, or from its own state."""
    return str(request.param)


def taking(serve: Any, folder: Any, drafts: int = 3, **options: Any) -> Any:
    speculative = {"model": NAME, "num_speculative_tokens": drafts}
    return serve(folder / "model", folder / "export", speculative_config=speculative, **options)


@pytest.mark.parametrize(
    ("drafts", "options"),
    [
        (3, {}),
        (7, {"enable_prefix_caching": True}),
        (2, {"max_num_batched_tokens": 32, "enable_chunked_prefill": True, "max_num_seqs": 8}),
    ],
    ids=["plain", "prefixes are cached", "prompts come in parts"],
)
def test_answers_and_depths_are_offramps(
    drafts: int, options: Any, name: str, made: Any, serve: Any
) -> None:
    folder = made(name)
    early, full = stored(folder), stored(folder, "full")
    prompts = [row["prompt"] for row in early]
    llm = taking(serve, folder, drafts, **options)
    for at_once in (1, 8, 24):
        got = answers(llm, prompts, at_once=at_once, extra_args=EARLY)
        assert [one[0] for one in got] == [row["tokens"] for row in early]
        assert [one[1] for one in got] == [row["depths"] for row in early]
    lossless = answers(llm, prompts)
    assert [one[0] for one in lossless] == [row["tokens"] for row in full]
    some = [set(row["depths"]) for row in early]
    assert {2} in some and {6} in some  # taken whole, and verified whole


def test_what_else_than_the_likeliest_token_decides_is_the_full_models(
    name: str, made: Any, serve: Any
) -> None:
    folder = made(name)
    early, full = stored(folder), stored(folder, "full")
    prompts = [row["prompt"] for row in early]
    assert [row["tokens"] for row in early] != [row["tokens"] for row in full]
    llm = taking(serve, folder)
    for asked in ({"logprobs": 0}, {"presence_penalty": 1e-6}, {"min_tokens": 2}):
        verified = answers(llm, prompts, **asked)
        assert answers(llm, prompts, extra_args=EARLY, **asked) == verified, asked
        if "min_tokens" not in asked:
            assert [one[0] for one in verified] == [row["tokens"] for row in full], asked
    drawn = answers(llm, prompts, extra_args=EARLY, temperature=0.9, seed=1)
    assert {depth for _, depths in drawn for depth in depths} == {6}


def test_requests_side_by_side_keep_their_modes(name: str, made: Any, serve: Any) -> None:
    from vllm import SamplingParams

    folder = made(name)
    early, full = stored(folder), stored(folder, "full")
    own = {"offramp": {"exits": str(folder / "export"), "mode": "early_exit"}}
    llm = taking(serve, folder, additional_config=own)
    modes = ({}, {"offramp_mode": "lossless"}, {"offramp_mode": "full"})
    params = [
        SamplingParams(temperature=0.0, max_tokens=20, detokenize=False, extra_args=extra)
        for _ in early
        for extra in modes
    ]
    asked = [{"prompt_token_ids": row["prompt"]} for row in early for _ in modes]
    mixed = [list(m.outputs[0].token_ids) for m in llm.generate(asked, params, use_tqdm=False)]
    assert mixed[0::3] == [row["tokens"] for row in early]
    assert mixed[1::3] == mixed[2::3] == [row["tokens"] for row in full]


def test_without_drafts_a_server_says_that_it_cannot(made: Any, serve: Any) -> None:
    folder = made("ends")
    from vllm.exceptions import VLLMValidationError

    llm = serve(folder / "model", folder / "export")
    with pytest.raises(VLLMValidationError, match="none of these"):
        answers(llm, [stored(folder)[0]["prompt"]], extra_args=EARLY)
