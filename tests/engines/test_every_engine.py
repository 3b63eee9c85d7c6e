"""The law of every engine, those of installed packages included: its words are the model's own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_cases import GREEDY, adapter_of

from offramp.adapter.adapter import Adapter
from offramp.core.errors import InputError
from offramp.engines import all_engines, engine_named
from offramp.extend import Runtime

FAMILY = "llava"
OTHERS = ("propagate", "cuda-graphs")
"""Of the laboratory: a method with approximate keys and values, and one that needs a GPU."""


NEEDS = {"llama.cpp": pytest.mark.llama_cpp}


@pytest.fixture(
    params=[
        pytest.param(name, marks=NEEDS.get(name, ()))
        for name, one in all_engines().items()
        if name not in OTHERS and not one.serves
    ]
)
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """An engine with the model and its exits, as `offramp.load` opens it."""
    engine, adapter = engine_named(request.param), adapter_of.__wrapped__(FAMILY)
    folder = tmp_path / "files" if engine.reads_files else None
    if folder is not None:
        assert engine.prepare is not None and engine.is_prepared is not None
        assert not engine.is_prepared(folder)
        engine.prepare(adapter, folder, "f32")
        assert engine.is_prepared(folder)
    runtime = engine.open(adapter, gguf=folder, context=256, threads=1, sequences=1)
    assert isinstance(runtime, Runtime if engine.replaces else Adapter)
    yield runtime
    if hasattr(runtime, "close"):
        runtime.close()


@pytest.mark.slow
def test_full_depth_and_lossless_are_the_models_own_words(opened: Any, batch: Any) -> None:
    own = adapter_of(FAMILY)  # in PyTorch, untouched
    for turn in range(2):
        inputs = {name: value[turn : turn + 1] for name, value in batch(FAMILY, 2).items()}
        wanted = own.backbone.model.generate(**inputs, **GREEDY)
        for mode in ("full", "lossless"):
            made = opened.generate(inputs, policy=own.policy.in_mode(mode), **GREEDY)
            assert made.sequences.tolist() == wanted.tolist(), mode
        early = opened.generate(inputs, policy=own.policy, **GREEDY)
        beside = own.generate(inputs, policy=own.policy, **GREEDY)
        assert torch.equal(early.sequences, beside.sequences)
        assert torch.equal(early.depths, beside.depths)


@pytest.mark.slow
def test_files_without_the_package_that_runs_them_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are written by `gguf` alone, so they may be where llama.cpp itself is not."""
    engine = engine_named("llama.cpp")
    assert engine.prepare is not None
    engine.prepare(adapter_of(FAMILY), tmp_path, "f32")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(InputError, match="llama_cpp") as refused:
        engine.open(adapter_of(FAMILY), gguf=tmp_path, context=256, threads=1, sequences=1)
    assert "llama-cpp]" in str(refused.value)
