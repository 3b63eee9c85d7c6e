"""Laws of several answers at once inside llama.cpp: each is what it is alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import families
import pytest
import torch
from gguf_cases import adapter_of

from offramp.core.decoding.policy import GenerationOutput
from offramp.core.errors import InputError
from offramp_llama_cpp import EngineOptions, LlamaCppRuntime

pytestmark = pytest.mark.llama_cpp

MODES = ("full", "early_exit", "lossless")
ROWS, NEW = 4, 12
NAMES = ("llava", "qwen2-vl", "gemma3")
"""Plain positions; several for each row; parts that look ahead, and windows."""


@pytest.fixture(scope="module", params=NAMES)
def runtime(request: pytest.FixtureRequest, exported: Any) -> Iterator[LlamaCppRuntime]:
    engine = EngineOptions(context=192, cache="f32", sequences=ROWS)
    folder = exported(request.param, "f32")
    with LlamaCppRuntime(adapter_of(request.param), folder, engine=engine) as each:
        yield each


def rows_of(name: str, count: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A padded batch of prompts, and each by itself."""
    inputs = families.kind_of(name).inputs(count)
    return inputs, [families.one_row(name, inputs, row) for row in range(count)]


def answer(output: GenerationOutput, row: int) -> list[tuple[int, int]]:
    """Tokens and depths, without what fills the row up."""
    pairs = zip(output.new_tokens[row].tolist(), output.depths[row].tolist(), strict=True)
    return [pair for pair in pairs if pair[1] > 0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [2, 4])
def test_answers_written_at_once_are_those_written_alone(
    mode: str, count: int, runtime: LlamaCppRuntime
) -> None:
    assert runtime.call_sizes.shared
    inputs, alone = rows_of(runtime.backbone.name, count)
    options: dict[str, Any] = {"mode": mode, "max_new_tokens": NEW, "do_sample": False}
    together = runtime.generate(inputs, **options)
    for row, each in enumerate(alone):
        assert answer(together, row) == answer(runtime.generate(each, **options), 0)


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_end_at_different_times_leave_the_others_alone(
    mode: str, runtime: LlamaCppRuntime
) -> None:
    """A word that some row says early ends it: its slot lies empty between the others'."""
    inputs, alone = rows_of(runtime.backbone.name, ROWS)
    options: dict[str, Any] = {"mode": mode, "max_new_tokens": NEW, "do_sample": False}
    whole = runtime.generate(inputs, **options)
    end = int(whole.new_tokens[1, 2])
    options["eos_token_id"] = end
    together = runtime.generate(inputs, **options)
    lengths = set()
    for row, each in enumerate(alone):
        expected = answer(runtime.generate(each, **options), 0)
        assert answer(together, row) == expected
        lengths.add(len(expected))
    assert len(answer(together, 1)) <= 3


def test_samples_are_those_of_their_seeds(runtime: LlamaCppRuntime) -> None:
    inputs, alone = rows_of(runtime.backbone.name, 3)
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": True, "temperature": 1.3}
    together = runtime.generate(inputs, seed=5, **options)
    for row, each in enumerate(alone):
        assert answer(together, row) == answer(runtime.generate(each, seed=5 + row, **options), 0)


def test_calls_are_shared(runtime: LlamaCppRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four answers take little more than a fourth of the calls."""
    calls: list[int] = []
    for segment in runtime._segments:
        decode = segment._decode

        def counted(batch: Any, row: Any, decode: Any = decode) -> None:
            calls.append(batch.n_tokens)
            decode(batch, row)

        monkeypatch.setattr(segment, "_decode", counted)
    inputs, alone = rows_of(runtime.backbone.name, ROWS)
    options: dict[str, Any] = {"mode": "full", "max_new_tokens": NEW, "min_new_tokens": NEW}
    runtime.generate(inputs, mode="full", max_new_tokens=1)
    prompts = len(calls)
    calls.clear()
    runtime.generate(inputs, **options)
    shared = len(calls)
    calls.clear()
    for each in alone:
        runtime.generate(each, **options)
    assert shared - prompts <= (len(calls) - prompts) / 3


def test_more_rows_than_sequences_are_refused(runtime: LlamaCppRuntime) -> None:
    inputs, _ = rows_of(runtime.backbone.name, ROWS + 1)
    with pytest.raises(InputError, match=f"sequences={ROWS + 1}"):
        runtime.generate(inputs, max_new_tokens=2)


def test_where_company_changes_bits_each_goes_by_itself(
    runtime: LlamaCppRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, alone = rows_of(runtime.backbone.name, 2)
    monkeypatch.setattr(runtime._chain, "sizes", replace(runtime.call_sizes, shared=False))
    for segment in runtime._segments:
        monkeypatch.setattr(segment, "feed_together", None)  # nobody may ask
    options: dict[str, Any] = {"mode": "lossless", "max_new_tokens": NEW, "do_sample": False}
    together = runtime.generate(inputs, **options)
    for row, each in enumerate(alone):
        assert answer(together, row) == answer(runtime.generate(each, **options), 0)


def test_an_answer_that_is_given_up_leaves_its_slot(runtime: LlamaCppRuntime) -> None:
    class GivenUp(Exception):
        pass

    class Streamer:
        def __init__(self) -> None:
            self.tokens = 0

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.dim() == 1
            if self.tokens == 3:
                raise GivenUp

        def end(self) -> None:
            pass

    inputs, _ = rows_of(runtime.backbone.name, ROWS)
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    before = runtime.generate(inputs, **options)
    with pytest.raises(GivenUp):
        runtime.generate(inputs, streamer=Streamer(), **options)
    after = runtime.generate(inputs, **options)
    assert torch.equal(before.sequences, after.sequences)
    assert torch.equal(before.depths, after.depths)
