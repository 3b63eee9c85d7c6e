"""Lossless answers: an exit as draft model, beside early exits in one server."""

from __future__ import annotations

from typing import Any

import pytest
from engine import answers, stored
from PIL import Image

from offramp_vllm.drafts import NAME


@pytest.fixture(params=["draft_model", "exit"])
def drafting(request: pytest.FixtureRequest, made: Any, serve: Any) -> Any:
    """A server of the tiny Llama with drafts, by another checkpoint or by its own exit."""
    folder = made("llama")
    speculative = {"method": "draft_model", "model": str(folder / "draft")}
    if request.param == "exit":
        speculative = {"model": NAME}
    return serve(
        folder / "model",
        folder / "export",
        disable_log_stats=False,
        speculative_config={**speculative, "num_speculative_tokens": 3},
    )


def accepted(llm: Any) -> tuple[int, int]:
    """Drafts so far, and those that were kept."""
    found = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
    return (
        found["vllm:spec_decode_num_draft_tokens"],
        found["vllm:spec_decode_num_accepted_tokens"],
    )


def test_an_exit_drafts_and_the_answers_are_the_full_models(made: Any, drafting: Any) -> None:
    full, llm = stored(made("llama"), "full"), drafting
    for at_once in (1, 8, 24):
        got = answers(llm, [row["prompt"] for row in full], at_once=at_once)
        assert [one[0] for one in got] == [row["tokens"] for row in full]
    drafted, kept = accepted(llm)
    assert drafted > 0 and kept > 0


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_drafters_of_eagle_3_run_in_vllm_with_images_too(name: str, made: Any, serve: Any) -> None:
    """What `offramp export --to speculators` writes, untrained."""
    from vllm import SamplingParams

    folder = made(name)
    full = stored(folder, "full")
    llm = serve(
        folder / "model",
        max_model_len=256,
        disable_log_stats=False,
        skip_tokenizer_init=name == "llama",
        speculative_config={
            "method": "eagle3",
            "model": str(folder / "eagle"),
            "num_speculative_tokens": 3,
        },
    )
    asked = [{"prompt_token_ids": row["prompt"]} for row in full]
    if name == "llava":
        pictures = [Image.open(folder / "images" / f"{at}.png") for at in range(len(full))]
        asked = [
            {"prompt": row["prompt"], "multi_modal_data": {"image": picture}}
            for row, picture in zip(full, pictures, strict=True)
        ]
    params = SamplingParams(temperature=0.0, max_tokens=20, detokenize=False)
    got = [list(m.outputs[0].token_ids) for m in llm.generate(asked, params, use_tqdm=False)]
    assert got == [row["tokens"] for row in full]
    assert accepted(llm)[0] > 0


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
        SamplingParams(
            temperature=0.0, max_tokens=20, detokenize=False, extra_args={"offramp_mode": mode}
        )
        for _ in early
        for mode in modes
    ]
    asked = [{"prompt_token_ids": row["prompt"]} for row in early for _ in modes]
    mixed = [list(m.outputs[0].token_ids) for m in llm.generate(asked, params, use_tqdm=False)]
    assert mixed[0::3] == [row["tokens"] for row in early]
    assert mixed[1::3] == mixed[2::3] == [row["tokens"] for row in full]


def test_drafts_begin_in_the_middle_of_answers_when_few_are_left(made: Any, serve: Any) -> None:
    """Until then no exit has run, and the keys that it lacks are made up for."""
    from vllm import SamplingParams

    folder = made("llama")
    full = stored(folder, "full")[:8]
    llm = serve(
        folder / "model",
        folder / "export",
        disable_log_stats=False,
        speculative_config={
            "model": NAME,
            "num_speculative_tokens": 3,
            "num_speculative_tokens_per_batch_size": [(1, 3, 3), (4, 256, 0)],
        },
    )
    lengths = [20 if place < 3 else 5 for place in range(len(full))]
    params = [SamplingParams(temperature=0.0, max_tokens=n, detokenize=False) for n in lengths]
    asked = [{"prompt_token_ids": row["prompt"]} for row in full]
    got = [list(m.outputs[0].token_ids) for m in llm.generate(asked, params, use_tqdm=False)]
    assert got == [row["tokens"][:n] for row, n in zip(full, lengths, strict=True)]
    assert accepted(llm)[1] > 0
