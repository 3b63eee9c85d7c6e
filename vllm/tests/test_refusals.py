"""What exits cannot do exactly is refused when the server starts, in two lines."""

from __future__ import annotations

from typing import Any

import pytest
from engine import answers, engine, stored

from offramp_vllm.refuse import Refused


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}, "Pipeline parallel"),
        ({"hf_overrides": {"num_hidden_layers": 3}}, "--hf-overrides"),
        ({"load_format": "bitsandbytes"}, "load format|Exits beside weights"),
        (
            {"speculative_config": {"model": "a.module.Class", "num_speculative_tokens": 2}},
            "a.module.Class",
        ),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "KV connector",
        ),
        ({"additional_config": {"offramp": {"exit": "here"}}}, "--additional-config"),
        ({"additional_config": {"offramp": {"exits": "nowhere"}}}, "adapter.json is missing"),
        ({"additional_config": {"offramp": {"exits": "here", "watch": 2}}}, "a share of answers"),
    ],
)
def test_settings_are_refused(options: dict[str, Any], word: str, made: Any) -> None:
    folder = made("llama")
    with pytest.raises(Refused, match=word) as refused:
        engine(folder / "model", folder / "export", **options)
    assert len(str(refused.value).splitlines()) == 2


def test_a_model_of_another_depth_is_refused(made: Any, serve: Any, tmp_path: Any) -> None:
    folder = made("llama")
    with pytest.raises(Refused, match="6"):
        engine(made("short") / "model", folder / "export")


def test_requests_that_ask_for_what_there_is_not_are_refused(made: Any, serve: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    folder = made("llama")
    llm = serve(folder / "model", folder / "export")
    early = stored(folder)
    for extra in ({"offramp_mode": "fast"}, {"offramp_threshold": 3}, {"offramp_mode": "lossless"}):
        with pytest.raises(VLLMValidationError):
            answers(llm, [early[0]["prompt"]], extra_args=extra)
    assert answers(llm, [early[0]["prompt"]])[0][0] == early[0]["tokens"]


def test_without_the_setting_vllm_is_as_it_was(made: Any, serve: Any) -> None:
    folder = made("llama")
    full = stored(folder, "full")
    got = answers(serve(folder / "model"), [row["prompt"] for row in full])
    assert got == [(row["tokens"], []) for row in full]


def test_what_vllm_runs_by_transformers_is_refused_by_that_name(made: Any) -> None:
    folder = made("llama")
    with pytest.raises(Refused, match="llama and runs it by transformers") as refused:
        engine(folder / "model", folder / "export", model_impl="transformers")
    assert len(str(refused.value).splitlines()) == 2
