"""What a benchmark times are answers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gguf_cases import adapter_of, inputs_of

from offramp.core.decoding.policy import ExitPolicy
from offramp_lab.experiments.experiment import Experiment, each
from offramp_lab.records.runtimes import methods

NAME = "llava"
FULL_DEPTH = ("generate", "float32", "full")


@pytest.mark.llama_cpp
def test_what_is_timed_is_the_whole_answer_and_ratios_are_of_its_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "FORMATS", ("f32",))
    adapter = adapter_of(NAME).with_policy(ExitPolicy({2: 0.5}))
    prompts = [inputs_of(NAME, seed) for seed in range(3)]
    encoder: Any = SimpleNamespace(eos=None)  # tiny models never end
    bench = methods.Bench(adapter, encoder, (), tmp_path)
    ways = {name: partial(methods.taken, way) for name, way in bench.methods().items()}
    runs = Experiment(ways, prompts, rounds=2).run()
    ids = {name: [ids for *_, ids in each(found)] for name, found in runs.items()}
    assert {name[0] for name in ids} == {
        "generate",
        "llama.cpp",
        methods.IN_LLAMA,
        methods.IN_TORCH,
        methods.WITH_ITS_KERNELS,
    }
    for mode in ("full", "lossless"):
        assert ids[methods.IN_TORCH, "float32", mode] == ids[FULL_DEPTH]
    for found in runs.values():
        for whole, decode, _ in each(found):
            assert (whole >= decode).all() and (decode > 0).all()
    entries = [{**dict(zip(methods.WAY, n, strict=True)), **methods.speeds(runs[n])} for n in runs]
    for entry in methods.with_ratios(entries, runs, lambda _: {"over": FULL_DEPTH}):
        name = tuple(entry[part] for part in methods.WAY)
        assert entry["tokens"] == sum(len(answer) - 1 for answer in ids[name]) / 2
        assert entry["cpu_tokens_per_second"] == pytest.approx(
            entry["tokens"] / entry["cpu_seconds"]
        )
        assert entry["over"] > 0 and (entry["over_interval"] is None) == (name == FULL_DEPTH)
