"""Laws of the batch engine over llama.cpp: each request gets what it gets alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from fakes import Blip2FakeProcessor, examples
from gguf_cases import adapter_of, drafting, refused

from offramp.adapter.adapter import Adapter
from offramp.adapter.certificate import VerificationSettings
from offramp.calibration.verification import Verification
from offramp.core.decoding.policy import GenerationOutput
from offramp.core.errors import InputError
from offramp.features.input_processor import InputProcessor
from offramp.features.vision_cache import VisionCache
from offramp.serving.batch_engine import BatchEngine
from offramp.serving.engine_config import EngineConfig
from offramp_llama_cpp import EngineOptions, LlamaCppRuntime, export_gguf

pytestmark = pytest.mark.llama_cpp

MODES = ("full", "early_exit", "lossless")
SLOTS, CONTEXT = 3, 192
ENGINE = EngineOptions(context=CONTEXT, cache="f32", sequences=SLOTS)
SIZES = EngineConfig(slots=SLOTS, limit=CONTEXT)


def told(output: GenerationOutput) -> list[tuple[int, int]]:
    pairs = zip(output.new_tokens[0].tolist(), output.depths[0].tolist(), strict=True)
    return [pair for pair in pairs if pair[1] > 0]


def tokens_of(pairs: list[tuple[int, int]]) -> list[int]:
    return [token for token, _ in pairs]


@pytest.fixture(params=["exits", "drafting exits"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], tuple[Adapter, Path]]:
    """`made(name)`: an adapter, and its export."""

    def make(name: str) -> tuple[Adapter, Path]:
        adapter = adapter_of(name)
        if request.param != "exits":
            adapter = drafting(adapter)
        adapter = replace(adapter, policy=replace(adapter.policy, lossless=False))
        export_gguf(adapter, tmp_path, "f32")
        return adapter, tmp_path

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "qwen2-vl", "gemma3"])
def test_requests_in_any_company_get_what_they_get_alone(name: str, made: Any) -> None:
    adapter, folder = made(name)
    rows = families.kind_of(name).inputs(4)
    prompts = [families.one_row(name, rows, row) for row in range(4)]
    asked = [(i, mode, 3 + 2 * i + n) for n, mode in enumerate(MODES) for i in range(4)]
    sampled = {"do_sample": True, "temperature": 0.8, "seed": 5}
    with LlamaCppRuntime(adapter, folder, engine=ENGINE) as runtime:
        alone = {
            (i, mode, new): runtime.generate(
                prompts[i],
                mode=mode,
                max_new_tokens=new,
                do_sample=False,
                return_dict_in_generate=True,
            )
            for i, mode, new in asked
        }
        own = runtime.generate(
            prompts[0], mode="full", max_new_tokens=9, return_dict_in_generate=True, **sampled
        )
        with BatchEngine(runtime, config=SIZES, queue=20) as engine:
            handles = {
                one: engine.submit(
                    prompts[one[0]], mode=one[1], max_new_tokens=one[2], do_sample=False
                )
                for one in asked
            }
            drawn = engine.submit(prompts[0], mode="full", max_new_tokens=9, **sampled)
            for one, handle in handles.items():
                output = handle.result(60).output
                mine, theirs = told(output), told(alone[one])
                if one[1] == "lossless":  # How far drafts go depends on the company; no token does.
                    mine, theirs = tokens_of(mine), tokens_of(theirs)
                assert mine == theirs, one
            assert told(drawn.result(60).output) == told(own)
            rounds = [h.result().output.rounds for one, h in handles.items() if one[1] == MODES[2]]
            assert not adapter.exits.draft_on or any(map(any, rounds))


def test_a_runtime_that_is_lent_answers_nobody_else(made: Any) -> None:
    adapter, folder = made("llava")
    inputs = families.kind_of("llava").inputs(1)
    with LlamaCppRuntime(adapter, folder, engine=ENGINE) as runtime:
        sizes = replace(SIZES, slots=2)
        refused(lambda: BatchEngine(runtime, config=sizes), InputError, "sequences=2")
        with BatchEngine(runtime) as engine:
            assert engine.core.config.slots == SLOTS
            refused(lambda: runtime.generate(inputs), InputError, "batch engine")
            long = engine.submit(inputs, max_new_tokens=CONTEXT)
            assert isinstance(long.exception(60), InputError)
            short = engine.submit(inputs, max_new_tokens=4, do_sample=False)
            assert len(told(short.result(60).output)) == 4


def test_a_text_about_ever_new_images_is_prepared_once(made: Any) -> None:
    """And what enters llama.cpp is the same, bit for bit."""
    adapter, folder = made("llava")
    options = {"max_new_tokens": 4, "do_sample": False}
    with LlamaCppRuntime(adapter, folder, engine=ENGINE) as runtime:
        whole, cache = runtime.entry(), VisionCache()
        host = runtime.host(adapter.policy, cache)
        for image in range(5):
            inputs = families.kind_of("llava").inputs(1)
            draw = torch.Generator().manual_seed(image)
            inputs["pixel_values"] = torch.randn(inputs["pixel_values"].shape, generator=draw)
            with torch.inference_mode():
                want = whole.prepare(inputs, options)
                [rows] = whole.prompts(want)
            prepared, _, prompt = host.prepare(inputs, options)
            assert torch.equal(prepared.ids, want.ids)
            assert np.array_equal(prompt.states, rows.states)
        assert host.entry.kept.hits == 3
        assert cache.misses == 5


def test_the_runtime_is_verified_alone_in_batches_and_in_company(made: Any) -> None:
    adapter, folder = made("llava")
    encoder = InputProcessor(adapter.backbone, Blip2FakeProcessor("llava"))
    sizes = VerificationSettings(rows=(2, 4), slots=SLOTS, longest=6)
    with LlamaCppRuntime(adapter, folder, engine=ENGINE) as runtime:
        one = Verification(adapter, encoder, examples(4), runtime=runtime, settings=sizes)
        assert one._inputs[-1]["input_ids"].shape[1] == CONTEXT - sizes.longest
        told: list[int] = []
        paths = one.run(told.append)
    names = [path.path for path in paths]
    assert names[-6:] == [
        f"{mode}, {where}"
        for where in ("2 rows", f"among {SLOTS}")
        for mode in ("full", "early exit", "lossless")
    ]
    assert all(path.promised and path.exact and path.tokens > 8 for path in paths[-6:])
    assert sum(told) == one.answers and runtime.adapter is adapter
